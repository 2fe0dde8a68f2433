"""Models that Dynamo traces once for all options: its graph does not depend on them.

Tracing takes longer than all the rest of a small test. Files whose tests are about steps, not about graphs, are marked
``shares_graphs``: there ``models.compiled`` is :func:`compiled`, and ``dllm_compile.reset()`` does between two models
what ``torch._dynamo.reset()`` does elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_compile.backend import dllm
from dllm_compile.sampler import compiled as of_sampler

MODULES: list[str] = []  # the test module whose graphs Dynamo holds
_CHOSEN: list[dict[str, Any]] = []  # options of the call under way


def in_use() -> bool:
    """Whether the test that runs shares its graphs with others."""
    return bool(MODULES)


@cache  # one object for each backend: Dynamo traces anew for another one
def _by_options(backend: Callable[..., Any]) -> Callable[..., Any]:
    """A backend for Dynamo: what ``backend`` makes of one graph for the options of each call, and for its arguments.

    Those that Dynamo shows are not kept: the weights among them belong to a model that may be gone by then.
    """

    def traced(module: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        made: dict[str, Callable[..., Any]] = {}

        def run(*args: Any) -> Any:
            options = _CHOSEN[-1]
            key = repr(sorted(options.items()))
            if key not in made:
                made[key] = backend(module, args, options=options)
            return made[key](*args)

        return run

    return traced


def compiled(
    model: Callable[..., Any], *, dynamic: bool = False, backend: Callable[..., Any] = dllm, **options: Any
) -> Callable[..., Any]:
    """The model behind the backend; Dynamo's graphs are those of all earlier models of one shape.

    Args:
        model: or a function of one; its class, sizes and settings tell which graph it gets.
        dynamic: whether one graph serves calls of all sizes. It is said, since what Dynamo chooses by itself depends on
            the calls before, which other tests may have made.
        backend: what makes a function of a graph and of options.
        options: of the backend.
    """
    traced = torch.compile(model, backend=_by_options(backend), dynamic=dynamic)

    def call(*args: Any, **more: Any) -> Any:
        _CHOSEN.append(options)
        try:
            return traced(*args, **more)
        finally:
            _CHOSEN.pop()

    return call


def steps_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on ``generate`` compiles its steps by :func:`compiled`: one trace serves all models of one shape, all
    lengths and all options of the backend, where ``generate`` itself has one for each model and its options. What else
    a step is made of, such as a threshold, has a trace of its own here too.
    """

    def compile_shared(
        function: Callable[..., Any], backend: Callable[..., Any], options: dict[str, Any]
    ) -> Callable[..., Any]:
        return compiled(function, dynamic=True, backend=backend, **options)

    monkeypatch.setattr(of_sampler, "torch", SimpleNamespace(compile=compile_shared))
    monkeypatch.setattr(of_sampler, "_copy", lambda function: function)
