"""``bench --lengths``: what it costs to meet a prompt length, a response length or a batch for the first time, and what
a process holds after a thousand of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from dllm_compile import compat
from dllm_compile.backend import dllm, stats
from dllm_compile.declared import loop

from .contest import Job
from .model import Setting, job_of, random_model

Size = tuple[int, int, int]
FIRST: tuple[Size, ...] = ((96, 64, 1), (128, 64, 1), (96, 64, 2), (128, 64, 3))
"""Prompt, response and batch of the generations that make code: Dynamo specializes a batch of one."""
THEN: tuple[Size, ...] = tuple((80 + 7 * i, (32, 64, 96)[i % 3], 1 + i % 4) for i in range(20))
CALLS = 4  # of a generation
BLOCKS: dict[str, Any] = {"method": "fast-dllm", "cache": "dual", "block_length": 32, "shift": False}
MANY = Setting(layers=2, width=32, mlp=64, heads=2, vocabulary=64)


@dataclass
class Found:
    """What one compiled model did.

    Attributes:
        seconds: of the first generation at each of the sizes that make code, in all.
        frames: that Dynamo traced behind those.
        graphs: that Inductor was given behind those, found in its cache or not.
        first: seconds of the first call at each further size.
        again: of the first call of a second generation of that size.
    """

    seconds: float
    frames: int
    graphs: int
    first: list[float]
    again: list[float]


def _made() -> tuple[int, int]:
    graphs = sum(compat.counters["inductor"][f"fxgraph_cache_{how}"] for how in ("hit", "miss", "bypass"))
    return compat.counters["stats"]["unique_graphs"], graphs


class Player:
    """A compiled model, and the first calls of loops on it.

    Args:
        setting: of the model.
        options: of the backend; ``None`` for plain Inductor.
    """

    def __init__(self, setting: Setting, options: dict[str, Any] | None) -> None:
        self.setting, self.model = setting, random_model(setting)
        known = {"mask_id": setting.vocabulary - 1, **(options or {})}
        self.call: Any = (
            torch.compile(self.model) if options is None else torch.compile(self.model, backend=dllm, options=known)
        )

    def play(self, size: Size) -> float:
        """Make some calls; returns the seconds of the first."""
        prompt, response, batch = size
        job: Job = job_of(replace(self.setting, prompt=prompt, response=response), batch)
        x, spent = job.ids.clone(), []
        with loop(), torch.no_grad():
            for step in range(CALLS):
                begin = time.perf_counter()
                self.call(x)
                spent.append(time.perf_counter() - begin)
                x[:, prompt + step] = step
        return spent[0]


def measure(setting: Setting, options: dict[str, Any] | None, first: Sequence[Size], then: Sequence[Size]) -> Found:
    """Generate a few tokens at sizes that make code, then at others, twice each.

    Args:
        setting: of the model.
        options: of the backend; ``None`` for plain Inductor.
        first: sizes that make code.
        then: the others.
    """
    torch.compiler.reset()
    play = Player(setting, options).play
    begin = time.perf_counter()
    for size in first:
        play(size)
    seconds, before = time.perf_counter() - begin, _made()
    spent = [(play(size), play(size)) for size in then]
    frames, graphs = (now - old for now, old in zip(_made(), before, strict=True))
    return Found(seconds, frames, graphs, [a for a, _ in spent], [b for _, b in spent])


def held(sequences: int = 1000, setting: Setting = MANY, parts: int = 10) -> None:
    """Print what a process holds, behind each tenth of some sequences of random sizes."""
    torch.compiler.reset()
    torch.set_num_threads(1)  # there is nothing to share
    player, draw, bound = Player(setting, {**BLOCKS, "max_state_bytes": 2**22}), random.Random(0), 2**22
    print(f"{sequences} sequences of random sizes, {setting.layers} layers of width {setting.width}, rows of layers")
    print(f"kept up to {bound:,} bytes:", flush=True)
    for i in range(sequences):
        player.play((draw.randint(2, 400), draw.choice([32, 64, 96, 128]), draw.choice([1, 2, 3, 4])))
        if (i + 1) % max(sequences // parts, 1) == 0:
            frames, graphs = _made()
            found = stats(player.model)
            print(
                f"{i + 1:>6} sequences: {frames} frames of Dynamo and {graphs} graphs of Inductor so far; rows of "
                f"layers {found['state_bytes']:,} bytes, logits {found['logits_bytes']:,}, peak of the process "
                f"{found['peak_bytes']:,}",
                flush=True,
            )


def main(setting: Setting | None = None, first: Sequence[Size] = FIRST, then: Sequence[Size] = THEN) -> None:
    """Print the first calls of both, one line each."""
    setting = setting or Setting()
    print(f"{len(then)} sizes after {len(first)}: {setting.layers} layers, width {setting.width}", flush=True)
    for name, options in (("inductor", None), ("fast-dllm dual", BLOCKS)):
        found = measure(setting, options, first, then)
        more = median(a - b for a, b in zip(found.first, found.again, strict=True))
        print(
            f"{name:<16}{found.seconds:>7.1f} s for the first sizes, then {found.frames} frames of Dynamo and "
            f"{found.graphs} graphs of Inductor; first call {1000 * median(found.first):.1f} ms, "
            f"{1000 * more:+.1f} against a second generation",
            flush=True,
        )
