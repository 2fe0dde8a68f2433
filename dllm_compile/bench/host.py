"""``bench --host``: a partial step of a model that is too narrow for arithmetic to matter, and what it calls."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch

import dllm_compile
from dllm_compile.backend import dllm
from dllm_compile.declared import loop

from .model import Setting, job_of, random_model

NARROW = Setting(layers=12, width=32, mlp=64, heads=2, vocabulary=64, prompt=64, response=64)
STEPS = 60  # timed of each
PACKAGE = Path(dllm_compile.__file__).parent


class Loop:
    """A loop of Fast-dLLM's dual cache that fills one token a call, and begins anew when all are filled."""

    def __init__(self, model: Any, setting: Setting) -> None:
        blocks: dict[str, Any] = {"method": "fast-dllm", "cache": "dual", "block_length": 32, "shift": False}
        self.call: Any = torch.compile(model, backend=dllm, options={**blocks, "mask_id": setting.vocabulary - 1})
        self.setting, self.job, self.left = setting, job_of(setting), 0
        self.word = loop()

    def next(self) -> bool:
        """Prepare a call; returns whether it is a partial step."""
        setting = self.setting
        if not self.left:
            self.x, self.left, self.word = self.job.ids.clone(), setting.response, loop()
        else:
            self.x = self.x.clone()
            self.x[:, setting.prompt + setting.response - self.left - 1] = 1
        partial = self.left % 32 != 0
        self.left -= 1
        return partial

    def step(self) -> None:
        """Make the call."""
        with self.word, torch.no_grad():
            self.call(self.x)


def milliseconds(call: Callable[[], object]) -> float:
    """Time of one call."""
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def traced(call: Callable[[], object]) -> list[str]:
    """Files of the project, in the order in which their functions are called."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents and not frame.f_code.co_name.startswith("<"):
            seen.append(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def main() -> None:
    """Print the times of a step, and the calls that one makes."""
    torch.set_num_threads(1)  # there is nothing to share
    model = random_model(NARROW)
    plain: Any = torch.compile(model)
    dual = Loop(model, NARROW)
    spent: dict[str, list[float]] = {"eager": [], "inductor": [], "dual": []}
    for _ in range(2 * NARROW.response):
        dual.next()
        dual.step()
    with torch.no_grad():
        for _ in range(3):
            plain(dual.x)
        while len(spent["dual"]) < STEPS:
            partial, took = dual.next(), milliseconds(dual.step)
            if partial:
                spent["dual"].append(took)
                spent["eager"].append(milliseconds(lambda: model(dual.x)))
                spent["inductor"].append(milliseconds(lambda: plain(dual.x)))
    print(f"{NARROW.layers} layers of width {NARROW.width}, median of {STEPS} partial steps, interleaved:", end=" ")
    print(", ".join(f"{name} {median(times):.2f} ms" for name, times in spent.items()), flush=True)
    few = replace(NARROW, layers=4)
    dual = Loop(random_model(few), few)
    for _ in range(few.response + 8):
        dual.next()
        dual.step()
    dual.next()
    files = traced(dual.step)
    changes = sum(a != b for a, b in itertools.pairwise(files))
    print(
        f"a partial step of {few.layers} layers: {len(files)} calls of {len({*files})} files, {changes} changes of file"
    )
    print(", ".join(f"{name} {count}" for name, count in Counter(files).most_common()))
