"""Models that Dynamo traces once for all options: its graph does not depend on them.

Tracing takes longer than all the rest of a small test. Files whose tests are about steps, not about graphs, are marked
``shares_graphs``: there ``models.compiled`` is :func:`compiled`, and ``dllm_compile.reset()`` does between two models
what ``torch._dynamo.reset()`` does elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dllm_compile.backend import dllm

MODULES: list[str] = []  # the test module whose graphs Dynamo holds
_CHOSEN: list[dict[str, Any]] = []  # options of the call under way


def in_use() -> bool:
    """Whether the test that runs shares its graphs with others."""
    return bool(MODULES)


def _by_options(module: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    """A backend for Dynamo: what ``dllm`` makes of one graph for the options of each call, and for its arguments.

    Those that Dynamo shows are not kept: the weights among them belong to a model that may be gone by then.
    """
    made: dict[str, Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        options = _CHOSEN[-1]
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = dllm(module, args, options=options)
        return made[key](*args)

    return run


def compiled(model: Callable[..., Any], *, dynamic: bool = False, **options: Any) -> Callable[..., Any]:
    """The model behind the backend; Dynamo's graphs are those of all earlier models of one shape.

    Args:
        model: or a function of one; its class, sizes and settings tell which graph it gets.
        dynamic: whether one graph serves calls of all sizes. It is said, since what Dynamo chooses by itself depends on
            the calls before, which other tests may have made.
        options: of the backend.
    """
    traced = torch.compile(model, backend=_by_options, dynamic=dynamic)

    def call(*args: Any, **more: Any) -> Any:
        _CHOSEN.append(options)
        try:
            return traced(*args, **more)
        finally:
            _CHOSEN.pop()

    return call
