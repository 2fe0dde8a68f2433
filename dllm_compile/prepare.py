"""Log calls in a model's code, which break its graph where Dynamo meets them, are left out where it traces."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from . import compat

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


def prepare(model: Anything) -> Anything:
    """Let a model's code log without breaking its graph. Call it before the model is first called compiled.

    A log call in a forward (a deprecated property of a configuration will do) makes Dynamo cut the graph in two, and a
    sampler that is compiled with the model is cut from its head. From now on, in the thread that calls this, Dynamo
    leaves out what is logged below an error by the loggers of the packages that the model's and its configuration's
    classes come from: in compiled code they say nothing. ``generate`` does so by itself while it runs.

    Args:
        model: a module, compiled or not.

    Returns:
        The same object, so that ``prepare(model).compile(backend="dllm")`` reads well.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"prepare takes a torch.nn.Module, not a {type(model).__name__}")
    functions = frozenset().union(*map(_methods, _loggers(model)))
    compat.dynamo_config.ignore_logging_functions = compat.dynamo_config.ignore_logging_functions | functions
    return model


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
