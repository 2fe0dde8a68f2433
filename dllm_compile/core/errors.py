"""Exceptions of the compiler. Mistakes in options are ``ValueError`` or ``TypeError``."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch.fx

from dllm_compile.compat import leave_vmaps, vmap_depth

from .arguments import called


class GraphRefused(Exception):
    """A graph, or a part of one, that the compiler does not take.

    It never reaches the user: the graph then runs on plain Inductor and the reason is said once.

    Args:
        reason: one sentence for the reader.
        node: the node at fault, if there is one.
    """

    def __init__(self, reason: str, node: torch.fx.Node | None = None) -> None:
        self.reason = reason
        self.node = node
        super().__init__(f"{reason} (at {describe(node)})" if node is not None else reason)


class TokensUnseen(GraphRefused):
    """A graph in which tokens cannot be found or followed. Where a graph broke before it, the break is the reason."""


class FunctionFailed(RuntimeError):
    """A function that a user brought, such as a mechanism's, raised an exception: the cause of this one, which reaches
    the user.
    """


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn an exception in its body into :class:`FunctionFailed`, which says whose function raised it.

    Args:
        what: who does what, as in "the rule 'dual' says rows".

    Raises:
        FunctionFailed: from the exception.
    """
    try:
        yield
    except Exception as error:
        raise FunctionFailed(f"{what} by a function that raised {type(error).__name__}: {error}") from error


@cache
def named(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` called inside of :func:`naming`. Equal arguments give the same object, since graphs are told apart
    by it.
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        with naming(what):
            return function(*args)

    return call


@contextmanager
def refusing(doing: str) -> Iterator[None]:
    """Turn an exception in its body, which is a fault of this package, into a :class:`GraphRefused` that asks to
    report it.

    The one place that catches everything: a graph we were not made for runs plainly and does not stop the user's
    program. What the graph's code raises when it *runs* is not for here. Where the environment variable ``DLLM_DEBUG``
    is 1, or names a folder (see :mod:`dllm_compile.debug`), nothing is caught.

    Args:
        doing: what failed, as in "the graph could not be ...".
    """
    depth = vmap_depth()
    try:
        yield
    except (GraphRefused, FunctionFailed):
        raise
    except Exception as error:
        if os.environ.get("DLLM_DEBUG", "0") not in ("", "0"):
            raise
        what = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        reason = f"the graph could not be {doing}, by {what}; please report this with the model"
        raise GraphRefused(reason, _at_fault(error)) from error
    finally:
        leave_vmaps(depth)  # an error may have come in the middle of a ``vmap``


def _at_fault(error: BaseException) -> torch.fx.Node | None:
    """The node that the innermost of our functions was busy with."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        node = frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and str(frame.f_globals.get("__name__")).startswith(__name__.split(".")[0]):
            return node
    return None


def describe(node: torch.fx.Node) -> str:
    """Name a node with what it calls and the line of the model it came from."""
    line = source_line(node)
    return f"node {node.name!r} ({called(node)})" + (f", {line}" if line else "")


def source_line(node: torch.fx.Node) -> str:
    """The innermost ``File ..., line N`` that Dynamo recorded for a node, or the empty string."""
    trace = node.meta.get("stack_trace") or ""
    places = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return places[-1] if places else ""
