"""A standing search for calls at which the backend is not eager: ``python -m tests.fuzz --seconds 60 --seed 0``.

Each case is a function of the seed and its number: a random model, options and a list of small operations. At neutral
settings, and with ``exact``, every call is compared with the eager model, on the rows that a sampler can read. At lossy
settings a call that begins something is, and two loops beside each other give the tokens of each alone. What fails is
cut down, and printed as a command that runs it again. Ends with status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass, field

import torch

from . import fuzz_cases
from .fuzz_cases import FEATURES, Case
from .fuzz_models import PLAIN
from .fuzz_run import Wrong, attempt
from .fuzz_shrink import shrink

SHARE = 0.35
"""Of the calls through Inductor that the search keeps to, so that no less than 30 % are in the end."""

KNOWN = (
    *FEATURES,
    "dynamic",
    *PLAIN,
    *(value for values in PLAIN.values() for value in values if isinstance(value, str)),
)


@dataclass
class Found:
    """What the search has seen."""

    cases: int = 0
    calls: dict[str, int] = field(default_factory=lambda: {"eager": 0, "inductor": 0})
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the calls through Inductor."""
        return self.calls["inductor"] / max(1, sum(self.calls.values()))


def search(seconds: float, seed: int, most: int, shrinking: float, without: tuple[str, ...]) -> Found:
    """Run cases for a time.

    Args:
        seconds: to search; what shrinking takes is added.
        seed: of the search.
        most: kinds of failures after which it stops; only the first of a kind is cut down.
        shrinking: seconds for each.
        without: features, switches of models, or values of them that no case has.
    """
    found, end = Found(), time.monotonic() + seconds
    while time.monotonic() < end and len(found.failures) < most:
        inductor = found.share < SHARE and found.cases > 0
        case = fuzz_cases.draw(seed, found.cases, inductor, without)
        wrong, calls = attempt(case, end)
        found.cases += 1
        found.calls[case["lowering"]] += calls
        if wrong is not None:
            end += _report(found, case, wrong, shrinking)
    return found


def _report(found: Found, case: Case, wrong: Wrong, shrinking: float) -> float:
    """Print a failure, cut down if it is the first of its kind; the seconds that took."""
    begin, kind = time.monotonic(), _kind(case, wrong)
    first = kind not in found.failures
    found.failures[kind] = found.failures.get(kind, 0) + 1
    print(f"case {case['seed']}: {wrong} at operation {wrong.at} ({kind})", flush=True)
    if first:
        small, wrong = shrink(case, wrong, shrinking)
        print(f"  {wrong}\n  {command(small)}", flush=True)
    return time.monotonic() - begin


def _kind(case: Case, wrong: Wrong) -> str:
    """What went wrong, in which kind of case, at which operation, and behind which one."""
    ops = case["ops"][max(0, wrong.at - 1) : wrong.at + 1]
    near = ", ".join(str(op[0]) for op in ops)
    return f"{wrong.what} / {case['kind']} / {near}"


def command(case: Case) -> str:
    """What runs a case again."""
    return f"python -m tests.fuzz --case '{json.dumps(case)}'"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="to search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=int, default=5, help="kinds of failures after which the search stops")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds to cut down each failure")
    parser.add_argument("--without", default="", help=f"what to leave out, by commas: {', '.join(KNOWN)}")
    parser.add_argument("--case", help="run this one alone")
    given = parser.parse_args(argv)
    without = tuple(name for name in given.without.split(",") if name)
    for name in without:
        if name not in KNOWN:
            parser.error(f"there is no {name!r} to leave out; give some of {', '.join(KNOWN)}")
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # Dynamo logs thousands of lines
    begin = time.monotonic()
    if given.case is not None:
        wrong, calls = attempt(json.loads(given.case))
        print(f"{calls} calls: {wrong} at operation {wrong.at}" if wrong is not None else f"{calls} calls: as eager")
        return int(wrong is not None)
    found = search(given.seconds, given.seed, given.failures, given.shrink, without)
    print(
        f"seed {given.seed}: {found.cases} cases, {sum(found.calls.values())} calls, "
        f"{found.share:.0%} through Inductor, "
        f"{time.monotonic() - begin:.0f} seconds, {sum(found.failures.values())} failures"
    )
    for kind, count in found.failures.items():
        print(f"{count:4}  {kind}")
    return int(bool(found.failures))


if __name__ == "__main__":
    sys.exit(main())
