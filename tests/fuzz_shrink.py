"""Cuts a failing case of the standing search down to one that a person can read."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

from . import fuzz_models
from .fuzz_cases import NEUTRAL, Case, Op
from .fuzz_run import Wrong, attempt, flat

THREADED = 4
"""Times that a case with threads is run before it counts as one that passes."""

SIMPLER: dict[str, tuple[tuple[int, Any], ...]] = {
    "start": ((3, 1), (4, 1), (4, 2), (5, 2), (5, 4), (6, "none"), (7, "plain"), (2, 1)),
    "call": ((2, ""), (3, "")),
    "fill": ((3, 1), (4, "best"), (5, 0), (2, 0)),
    "remask": ((3, 1),),
    "score": ((3, "masked"), (4, "")),
}
"""By operation: a place in it, and a simpler value there."""


class _Shrinker:
    def __init__(self, case: Case, wrong: Wrong, seconds: float) -> None:
        self.case, self.wrong, self.end = case, wrong, time.monotonic() + seconds

    def takes(self, case: Case) -> bool:
        """Whether a case fails in the same way; it is then the one to go on from."""
        if time.monotonic() > self.end:
            return False
        threaded = any(op[0] == "threads" for op in case["ops"])
        for _ in range(THREADED if threaded else 1):
            try:
                wrong, _ = attempt(case, self.end)
            except Exception:
                return False  # this cut left no case at all, such as options that do not go together
            if wrong is not None and (threaded or wrong.what == self.wrong.what):  # threads fail in many ways
                self.case, self.wrong = case, wrong
                return True
        return False

    def with_(self, **changes: Any) -> bool:
        return self.takes({**self.case, **changes})

    def run(self) -> None:
        """Everything, over and over while it helps."""
        if not self.with_(ops=self.case["ops"][: self.wrong.at + 1]):
            self.wrong.detail += " (not seen again alone)"
            return
        for name, value in (("lowering", "eager"), ("dynamic", None), ("inference", False), ("dtype", "float64")):
            if self.case.get(name) not in (value, None):
                self.with_(**{name: value})
        if any(op[0] == "threads" for op in self.case["ops"]):
            self.with_(ops=flat(self.case["ops"]))
        last = self.case["ops"][-1:]
        if last and last[0][0] == "threads":
            self.with_(ops=last)
        self._jump()
        before = None
        while before != self.case and time.monotonic() < self.end:
            before = copy.deepcopy(self.case)
            self._drop_operations()
            self._simplify_options()
            self._simplify_model()
            self._simplify_operations()

    def _jump(self) -> None:
        """The simplest model and options at once, where they will do: what is left runs faster."""
        self.with_(model={"name": "plain"})
        if self.case.get("kind") == "neutral":
            mask = {name: value for name, value in self.case["options"].items() if name == "mask_id"}
            self.with_(options={"method": "exact", **mask})

    def _drop_operations(self) -> None:
        """Halves first, then smaller parts, then single ones; inside of threads too."""
        size = max(1, len(self.case["ops"]) // 2)
        while size:
            at = len(self.case["ops"]) - size
            while at > -size:
                ops = self.case["ops"]
                left = ops[: max(0, at)] + ops[max(0, at) + size :]
                if left and len(left) < len(ops):
                    self.with_(ops=left)
                at -= size
            size //= 2
        for number, op in enumerate(self.case["ops"]):
            if op[0] == "threads":
                self._drop_in_threads(number)

    def _drop_in_threads(self, number: int) -> None:
        for which in range(1, len(self.case["ops"][number])):
            size = max(1, len(self.case["ops"][number][which]) // 2)
            while size:
                at = len(self.case["ops"][number][which]) - size
                while at >= 0:
                    ops = copy.deepcopy(self.case["ops"])
                    del ops[number][which][at : at + size]
                    self.with_(ops=ops)
                    at -= size
                size //= 2

    def _simplify_options(self) -> None:
        options = self.case["options"]
        for name in ("verify", "max_state_bytes", "shift", "readable", "block_length"):
            if name in options:
                self.with_(options={key: value for key, value in self.case["options"].items() if key != name})
        extra = {name: options[name] for name in ("mask_id", "shift", "readable") if name in self.case["options"]}
        if self.case.get("kind") == "neutral" and self.case["options"].get("method") != "exact":
            for simpler in NEUTRAL[:2]:
                if {**simpler, **extra} == self.case["options"] or self.with_(options={**simpler, **extra}):
                    break

    def _simplify_model(self) -> None:
        for switch in [name for name in self.case["model"] if name != "name"]:
            left = {name: value for name, value in self.case["model"].items() if name != switch}
            if switch == "seed" or left.get("name") == "plain" or switch not in fuzz_models.PLAIN:
                self.with_(model=left)

    def _simplify_operations(self) -> None:
        for number in range(len(self.case["ops"])):
            for place, value in SIMPLER.get(self.case["ops"][number][0], ()):
                for ops in _simpler(self.case["ops"], number, place, value):
                    self.with_(ops=ops)


def _simpler(ops: list[Op], number: int, place: int, value: Any) -> Iterator[list[Op]]:
    now = ops[number]
    if place < len(now) and now[place] != value and (not isinstance(value, int) or now[place] > value):
        yield [*ops[:number], [*now[:place], value, *now[place + 1 :]], *ops[number + 1 :]]


def shrink(case: Case, wrong: Wrong, seconds: float) -> tuple[Case, Wrong]:
    """A smaller case that fails in the same way.

    Args:
        case: what fails.
        wrong: how.
        seconds: to spend.

    Returns:
        The smallest found, and what is wrong with it.
    """
    shrinker = _Shrinker(case, wrong, seconds)
    shrinker.run()
    return {name: value for name, value in shrinker.case.items() if name != "seed"}, shrinker.wrong
