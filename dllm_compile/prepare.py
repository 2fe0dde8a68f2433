"""What breaks a model's graph where Dynamo meets it: log calls are left out, ``dir`` is spelled out, and modules whose
rows are independent become one call.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from . import compat
from .breaks import prepared
from .opaque_modules import CALL_FAILS, Told, prepare_modules, some_ids

Anything = TypeVar("Anything")
Functions = frozenset[Callable[..., Any]]
METHODS = ("debug", "info", "warning", "warn", "log", "info_once", "warning_once", "warning_advice")
"""Methods of a logger that return nothing and end nothing, transformers' own among them; errors stay."""


@contextmanager
def without_logs() -> Iterator[None]:
    """Dynamo traces as if nothing called a logger, or ``warnings.warn``; in this thread, until the block ends."""
    before = compat.dynamo_config.ignore_logging_functions
    compat.dynamo_config.ignore_logging_functions = before | _methods(logging.Logger) | {warnings.warn}
    try:
        yield
    finally:
        compat.dynamo_config.ignore_logging_functions = before


def prepare(model: Anything, ids: torch.Tensor | None = None, **more: Any) -> Anything:
    """Mend what breaks the graph of a model, where that can be. Call it before the model is first called compiled.

    - Log calls. A log call in a forward (a deprecated property of a configuration will do) makes Dynamo cut the graph
      in two, and a sampler that is compiled with the model is cut from its head. From now on, in the thread that calls
      this, Dynamo leaves out what is logged below an error by the loggers of the packages that the model's and its
      configuration's classes come from: in compiled code they say nothing. ``generate`` does so by itself while it
      runs.
    - ``dir(self)``. Dynamo reads the names of a module's attributes from now on, with guards (from torch 2.13 on).
    - Experts, and whatever else breaks the graph inside of a layer though each of its rows depends on the same row
      alone. Such a module becomes one call, which runs in eager, if a trial proves it of all that it returns
      (``docs/what-it-takes.md``). A warning names each module that breaks the graph and stays as it is, and why.

    The model is called once in eager for the last.

    Args:
        model: a module, compiled or not; what is trained or copied is what it was.
        ids: ``[B, S]`` token ids of the call, ``[2, 12]`` random ones by default.
        more: what else the model is called with.

    Returns:
        The same object, so that ``prepare(model).compile(backend="dllm")`` reads well.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"prepare takes a torch.nn.Module, not a {type(model).__name__}")
    functions = frozenset().union(*map(_methods, _loggers(model)))
    compat.dynamo_config.ignore_logging_functions = compat.dynamo_config.ignore_logging_functions | functions
    trace_dir()
    whole = compat.uncompiled(model)
    if ids is None:
        _prepare_without_ids(whole, more)
    else:
        _tell(prepare_modules(whole, ids, more))
    prepared(whole)
    return model


def _prepare_without_ids(model: torch.nn.Module, more: dict[str, Any]) -> None:
    """:func:`prepare` with random ids, for a model that takes ids; warns where it cannot be called with them."""
    ids = some_ids(model)
    if ids is None:
        return
    try:
        told = prepare_modules(model, ids, more)
    except CALL_FAILS as error:
        said = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"dllm: prepare could not call the model with random ids, and looked at no modules ({said}); "
            "hand it ids, and what else the model is called with",
            stacklevel=3,
        )
    else:
        _tell(told)


def _tell(found: Sequence[Told]) -> None:
    for each in found:
        warnings.warn(
            f"dllm: the graph breaks at {each.place}, in {each.name}, which cannot be one call: {each.reason}",
            stacklevel=4,
        )


@cache
def trace_dir() -> None:
    """Let Dynamo trace ``dir`` of a module in this process."""
    torch.compiler.substitute_in_graph(dir, skip_signature_check=True)(names_of)


def names_of(value: object = None, /) -> list[str]:
    """``dir`` of a module, spelled out so that Dynamo traces it and guards the names; of other objects it breaks the
    graph.
    """
    if not isinstance(value, torch.nn.Module) or type(value).__dir__ is not torch.nn.Module.__dir__:
        compat.graph_break()
    found: dict[str, None] = {}
    for held in (*[base.__dict__ for base in type(value).__mro__], value.__dict__):
        for name in held:
            found[name] = None
    for kind in compat.NAMED:
        for name in getattr(value, kind):
            found[name] = None
    return sorted([name for name in found if not name[0].isdigit()])


def _methods(owner: object) -> Functions:
    return frozenset(getattr(owner, name) for name in METHODS if hasattr(owner, name))


def _loggers(model: torch.nn.Module) -> list[logging.Logger]:
    """Those in the modules that the model's and its configuration's classes are defined in, and in their packages."""
    parts = [*model.modules(), *[each.config for each in model.modules() if hasattr(each, "config")]]
    homes = {base.__module__ for part in parts for base in type(part).__mro__}
    packages = {home.partition(".")[0] for home in homes} - {"builtins", "torch"}
    named = [each for name, each in logging.root.manager.loggerDict.items() if name.partition(".")[0] in packages]
    own = [vars(sys.modules[home]).values() for home in homes if home.partition(".")[0] in packages]
    return [
        each for each in [*named, *(value for values in own for value in values)] if isinstance(each, logging.Logger)
    ]
