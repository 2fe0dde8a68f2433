"""Where Dynamo broke a graph in two: said once a place, as parts of a model are served less well than the whole."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import compat

_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")
_TOLD: set[str] = set()
_PREPARED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weights of models that ``prepare`` did what it can for


class Break(NamedTuple):
    """Where a graph broke.

    Attributes:
        place: file and line.
        said: the same, with the function, the lines that led there, and Dynamo's reason.
    """

    place: str
    said: str


def prepared(model: torch.nn.Module) -> None:
    """Leave out :func:`prepare` in warnings of breaks in this model from now on."""
    _PREPARED.update(dict.fromkeys(model.parameters()))


def last_break() -> Break | None:
    """Where and why the graph of a function that runs now broke, of the innermost such; ``None`` if none did.

    What lies behind a break, and what is called at it, is compiled when it is reached; the function that was cut, or
    what Dynamo made of the rest of it, is then still running. Dynamo notes the stack of each break, from that function
    on, and of a function that it could not cut, and so runs in eager, the line that it failed at.
    """
    failed = {(each.co_filename, each.co_firstlineno): each for each in compat.get_compilation_metrics()}
    broken = [each for each in reversed(compat.graph_break_reasons) if each.graph_break and each.user_stack]
    frame = sys._getframe().f_back
    while frame is not None:
        code = frame.f_code
        here = [each for each in broken if _holds(code, each.user_stack[0])]
        if here:
            stack = here[0].user_stack
            said = f"{_place(stack)} ({here[0].reason.splitlines()[0]})"
            return Break(f"{stack[-1].filename}:{stack[-1].lineno}", said)
        found = failed.get((code.co_filename, code.co_firstlineno))
        if found is not None and found.fail_user_frame_lineno and found.fail_reason:
            place = f"{found.fail_user_frame_filename}:{found.fail_user_frame_lineno}"
            return Break(place, f"{place} ({found.fail_reason.splitlines()[0]})")
        frame = frame.f_back
    return None


def tell_of(where: Break, given: Sequence[Any], cut: bool = False) -> None:
    """Warn of a break, once a place.

    Args:
        where: of :func:`last_break`.
        given: what the graph behind it is called with, weights among it.
        cut: whether the choice of tokens lies behind it, and the head before.
    """
    if where.place in _TOLD:
        return
    _TOLD.add(where.place)
    what = " and cut the choice of tokens from the head" if cut else ""
    known = any(each in _PREPARED for each in given if isinstance(each, torch.Tensor))
    advice = "" if known else ". Call dllm_compile.prepare(model) before: it mends log calls, and mixtures of experts"
    warnings.warn(f"dllm: a graph broke{what} at {where.said}{advice}", stacklevel=2)


def forget() -> None:
    """Let every place be warned of again."""
    _TOLD.clear()


def _holds(code: CodeType, line: FrameSummary) -> bool:
    """Whether a line is one of a function, whose rest may have been resumed under another name."""
    if (code.co_filename, _written(code.co_name)) != (line.filename, _written(line.name)):
        return False
    lines = [number for _, _, number in code.co_lines() if number]
    return line.lineno is not None and min(lines) <= line.lineno <= max(lines)


def _written(name: str) -> str:
    """The name of a function as it was written, not as Dynamo resumes it."""
    resumed = _RESUMED.fullmatch(name)
    return resumed[1] if resumed else name


def _place(stack: Sequence[FrameSummary]) -> str:
    """The line that broke the graph, and the lines that led there."""
    *callers, last = stack
    led = "".join(f", from {Path(each.filename).name}:{each.lineno}" for each in reversed(callers[-3:]))
    return f"{last.filename}:{last.lineno} in {_written(last.name)}{led}"
