"""Compiled forms of a function of a model, kept for as long as the model lives."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from dllm_compile.backend import of_generate
from dllm_compile.prepare import without_logs

_COMPILED: weakref.WeakKeyDictionary[Any, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def compiled(function: Callable[..., Any], model: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """``function`` compiled by this backend; the same callable for the same model and options.

    Logging in the model's code is left out where Dynamo traces it, as a log call breaks the graph. The function takes
    the model as an argument, so that nothing kept here holds it.

    Args:
        function: a plain Python function.
        model: whom to keep the result for; it must be hashable and take weak references, as modules do.
        options: of the backend.
    """
    mine = _COMPILED.setdefault(model, {})
    key = (function, tuple(sorted(options.items())))
    if key not in mine:
        mine[key] = _without_logs(torch.compile(_copy(function), backend=of_generate, options=options))
    return mine[key]


def _without_logs(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with without_logs():
            return function(*args, **kwargs)

    return call


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: Dynamo counts the graphs of each, and stops at a few."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
