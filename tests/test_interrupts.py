"""An interrupt at any line of a call: the same ids again give one of the two right results, as do the next ones."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import dllm_compile

from . import models
from .callers import EQUAL, METHODS, RESPONSE, TOLERANCE, build, fill, off, start
from .models import MASK

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]

Call = Callable[[torch.Tensor], torch.Tensor]
SOURCES = tuple(
    str(Path(folder).resolve())
    for package in (dllm_compile, dllm_compile.passes, dllm_compile.kernels)  # the last two may be links
    for folder in package.__path__
)
POINTS = 16
INTERRUPTED = 3  # the step that is interrupted, from 0
AFTER = 3  # steps looked at behind it
SETTINGS = {
    **EQUAL,
    **METHODS,
    "dllm-cache": {"prompt_interval": 8, "response_interval": INTERRUPTED + 1, "transfer_ratio": 0.25},
}
"""A step that counted although it never ran would be followed by a refresh that is not due."""


class Lines:
    """Counts the lines of the package that a call runs; at the chosen one Ctrl-C arrives.

    Garbage is not collected meanwhile: models of other tests would die at some line of this call, and Python drops an
    interrupt that arrives while a weak reference tells of it.
    """

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.count, self.at = stop, 0, ""
        self.first: dict[tuple[str, int], int] = {}
        self.last: dict[tuple[str, int], int] = {}
        self._known: dict[str, bool] = {}

    def _is_ours(self, name: str) -> bool:
        if name not in self._known:
            self._known[name] = not name.startswith("<") and str(Path(name).resolve()).startswith(SOURCES)
        return self._known[name]

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not self._is_ours(frame.f_code.co_filename):
            return None
        if event == "line":
            if self.count == self.stop:
                self.at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
            line = frame.f_code.co_filename, frame.f_lineno
            self.first.setdefault(line, self.count)
            self.last[line] = self.count
            self.count += 1
        return self._trace

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        gc.disable()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)
        gc.enable()


def ids(model: Any, options: dict[str, Any], steps: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids and logits of an uninterrupted run."""
    call, x = models.compiled(model, **options), start(seed=seed)
    xs, logits = [], []
    for _ in range(steps):
        xs.append(x)
        logits.append(call(x).clone())
        x = fill(logits[-1], x)
    return xs, logits


def begun_at(model: Any, options: dict[str, Any], xs: list[torch.Tensor], word: bool) -> list[torch.Tensor]:
    """Logits of these ids where the first is the first of a sequence."""
    call = models.compiled(model, **options)
    if not word:
        return [call(x).clone() for x in xs]
    with dllm_compile.loop():
        return [call(x).clone() for x in xs]


def dropped_before(model: Any, options: dict[str, Any], xs: list[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Logits of the ids from the step ``at`` on, where its sequence had lost its rows to another one."""
    call = models.compiled(model, max_state_bytes=0, **options)
    for x in [*xs[:at], start(seed=99)]:
        call(x)
    return [call(x).clone() for x in xs[at:]]


def spread(lines: Lines, points: int = POINTS) -> list[int]:
    """Lines to stop at: the first time that a line of the source is run, and the last, for some of all lines."""
    chosen = {0, lines.count - 1}
    for times, share in ((lines.first, points), (lines.last, points // 4)):
        each = sorted(times.values())
        chosen.update(each[:: max(1, len(each) // share)])
    return sorted(chosen)


@pytest.mark.parametrize(
    ("name", "interrupted", "form"),
    [
        *((name, INTERRUPTED, "whole") for name in ("dllm-cache", "dual", "sparse", "dyllm", "dkv-cache")),
        *((name, INTERRUPTED, "alone") for name in ("dllm-cache", "dual", "dyllm")),
        ("exact", INTERRUPTED, "whole"),
        ("dllm-cache", 0, "whole"),
        ("sparse", 0, "whole"),
        ("dual", 4, "whole"),  # the first step of a block
        ("sparse", 5, "whole"),  # the step that chooses what is kept
    ],
)
def test_an_interrupted_step_is_one_of_the_two_right_ones(name: str, interrupted: int, form: str) -> None:
    options, total = SETTINGS[name], min(interrupted + 1 + AFTER, RESPONSE)
    model = build(form)
    xs, smooth = ids(model, options, total, seed=1)
    dllm_compile.reset()
    begun = [begun_at(model, options, xs[interrupted:], word=False)]
    dllm_compile.reset()
    begun.append(begun_at(model, options, xs[interrupted:], word=True))
    dllm_compile.reset()
    begun.append(dropped_before(model, options, xs, interrupted))
    dllm_compile.reset()
    call = models.compiled(model, **options)
    for x in xs:
        call(x)
    dllm_compile.reset()
    for x in xs[:interrupted]:
        call(x)
    with Lines() as lines:
        call(xs[interrupted])
    wrong, stopped = [], 0
    for stop in spread(lines):
        dllm_compile.reset()
        for x in xs[:interrupted]:
            call(x)
        line = Lines(stop)
        try:
            with line:
                call(xs[interrupted])
        except KeyboardInterrupt:
            stopped += 1
        for step in range(interrupted, total):
            rows = xs[step] == MASK
            got = call(xs[step]).clone()
            right = [smooth[step], model(xs[step]), *(each[step - interrupted] for each in begun)]
            nearest = min(off(got, want, rows) for want in right[: 2 if step == interrupted else None])
            if nearest > TOLERANCE:
                wrong.append((line.at, step - interrupted, nearest))
    assert stopped >= POINTS // 2
    assert not wrong


@pytest.mark.parametrize("name", ["dllm-cache", "dual", "dyllm"])
def test_an_interrupt_then_another_prompt(name: str) -> None:
    model = build()
    call = models.compiled(model, **METHODS[name])
    xs, _ = ids(model, METHODS[name], INTERRUPTED + 1, seed=1)
    for x in xs:
        call(x)
    dllm_compile.reset()
    with Lines() as lines:
        call(xs[0])
    for stop in spread(lines, POINTS // 4):
        dllm_compile.reset()
        for x in xs[:-1]:
            call(x)
        try:
            with Lines(stop):
                call(xs[-1])
        except KeyboardInterrupt:
            pass
        other = start(seed=2)
        assert off(call(other), model(other), other == MASK) < TOLERANCE


def test_an_error_of_the_model_in_mid_sequence() -> None:
    """A hook of the user raises once in a step; the next call with the same ids is right."""
    model = build("alone")
    fail = False

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if fail:
            raise ValueError("stop")

    model.layers[2].register_forward_hook(torch.compiler.disable(hook))
    call = models.compiled(model, **METHODS["dllm-cache"])
    x = start()
    for _ in range(3):
        x = fill(call(x), x)
    fail = True
    with pytest.raises(ValueError, match="stop"):
        call(x)
    fail = False
    want = model(x)
    got = call(x)
    assert got.isfinite().all()
    dllm_compile.reset()
    model = build("alone")
    call, y = models.compiled(model, **METHODS["dllm-cache"]), start()
    for _ in range(3):
        y = fill(call(y), y)
    assert torch.equal(x, y)
    assert min(off(got, want, x == MASK), off(got, call(y), x == MASK)) < TOLERANCE
