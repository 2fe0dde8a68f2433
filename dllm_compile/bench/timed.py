"""Time what compiles: only a run in which nothing was compiled counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm_compile import compat
from dllm_compile.runtime import unit_code
from dllm_compile.runtime.session import sessions

MOST_RUNS = 4
"""Of the same, of which the last counts whatever was compiled in it."""


@dataclass
class Run:
    """One job as it went.

    Attributes:
        ids: what the job ended with.
        seconds: by the clock.
        forwards: calls of the model; 0 where they were not counted.
        calls: seconds of each forward by the variant that ran.
        cpu: seconds of this process' threads on a processor, which other work on the machine changes little.
        every_kind: forwards behind which each variant had run once; 0 where that was not looked for.
        before, after: what ``stats`` said of the model.
    """

    ids: torch.Tensor
    seconds: float
    forwards: int
    calls: dict[str, list[float]] = field(default_factory=dict)
    cpu: float = 0.0
    every_kind: int = 0
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)


class Timed:
    """Times runs. What has a new key runs once before the run that counts. A run in which anything was compiled does
    not count: the same runs again, up to ``MOST_RUNS`` in all. Each run begins without what is kept of sequences.
    """

    def __init__(self) -> None:
        self.before: dict[Any, list[Run]] = {}  # by key, runs that do not count, which are not reported yet

    def beforehand(self, key: Any, run: Callable[[], Run]) -> Run:
        """Run what has a new key, so that the next of this key counts at once if it compiles nothing."""
        drop_state()
        found = run()
        self.before.setdefault(key, []).append(found)
        return found

    def __call__(self, key: Any, run: Callable[[], Run], first: Callable[[], Run] | None = None) -> tuple[Run, float]:
        """Run until nothing is compiled any more.

        Args:
            key: of what is alike.
            run: runs it.
            first: runs it where the key is new, if that may be shorter.

        Returns:
            The run that counts, and the seconds that were spent on compiling in those that do not: by how much they
            took longer for as many forwards.
        """
        if key not in self.before:
            self.beforehand(key, first or run)
        before, self.before[key] = self.before[key], []
        while True:
            drop_state()
            with compiled() as made:
                found = run()
            if not made or len(before) >= MOST_RUNS - 1:
                return found, sum(max(0.0, each.seconds - _usual(found, each.forwards)) for each in before)
            before.append(found)


def _usual(run: Run, forwards: int) -> float:
    """Seconds of so many forwards of a run, or of all of it where they are not counted."""
    return run.seconds * forwards / run.forwards if run.forwards else run.seconds


@contextmanager
def compiled() -> Iterator[list[str]]:
    """What is compiled inside of the block, complete behind it: steps that code is made for, and graphs of Dynamo,
    whoever compiles them.
    """
    made: list[str] = []
    graphs = compat.counters["stats"]["unique_graphs"]
    unit_code.LISTENERS.append(made.append)
    try:
        yield made
    finally:
        unit_code.LISTENERS.remove(made.append)
        made += ["graph"] * (compat.counters["stats"]["unique_graphs"] - graphs)


def drop_state() -> None:
    """Free what is kept of sequences: what a peak is counted from."""
    for session in sessions():
        session.drop()


def clocked(filled: Callable[[], torch.Tensor]) -> Run:
    """Ids that a function returns, and the seconds that it took."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    ids = filled()
    return Run(ids, time.perf_counter() - begin, 0, cpu=time.process_time() - begin_cpu)
