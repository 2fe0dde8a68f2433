"""Find the fastest setting whose answers are as good as those of a baseline: successive halving over settings.

Nothing in here knows a model: :func:`search` is given a function that runs a setting on a batch of problems. Rungs
double the batches. At each one a setting is dropped where it answers worse than the baseline by more than the bound and
one paired standard error, and so is the slower half of the others. After the last rung the bound is applied as it is;
settings that were dropped for their speed, but are faster than the best that is left, are then run to the end too: what
was faster than they were turned out to be wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, log
from statistics import fmean
from typing import Any, NamedTuple

from .means import gained, standard_error

Setting = Mapping[str, Any]
GOES_ON, SLOW, WRONG, REFUSED = "goes on", "slower half", "accuracy", "refused"


class Evaluated(NamedTuple):
    """What one setting did on one batch of problems.

    Attributes:
        right: of each problem, in order, 1 for a right answer, 0 for a wrong one, or a share between.
        tokens: that count.
        seconds: that it took by the clock, compilation aside.
        cpu: the same in seconds of this process' threads on a processor.
        compile_seconds: what compiling took, if anything was.
    """

    right: Sequence[float]
    tokens: int
    seconds: float
    cpu: float
    compile_seconds: float = 0.0


Evaluate = Callable[[Setting, Any], Evaluated]
"""Runs a setting on a batch; raises ``ValueError`` where the setting is not for such a model or such problems."""


@dataclass(frozen=True)
class Row:
    """A setting as it stood behind a rung; differences and ratios are to the baseline on the same problems.

    Attributes:
        name, setting: what it is.
        problems: that it was run on.
        right: share of right answers.
        difference, error: that, less the baseline's, and the paired standard error of it; ``None`` of one problem.
        tokens_per_second: by the clock.
        ratio, ratio_error: speed against the baseline's by time on a processor, and its standard error over batches;
            ``None`` of one batch.
        compile_seconds: what compiling took.
        verdict: why it is out, or that it goes on.
        why: the sentence that refused it.
    """

    name: str
    setting: Setting
    problems: int
    right: float
    difference: float
    error: float | None
    tokens_per_second: float
    ratio: float
    ratio_error: float | None
    compile_seconds: float
    verdict: str
    why: str


@dataclass
class _Standing:
    """A setting in the search, and what it did on the batches so far."""

    name: str
    setting: Setting
    done: list[Evaluated] = field(default_factory=list)
    verdict: str = GOES_ON
    why: str = ""

    def take(self, evaluate: Evaluate, batch: Any) -> None:
        """Run on one more batch."""
        try:
            self.done.append(evaluate(self.setting, batch))
        except ValueError as refusal:
            self.verdict, self.why = REFUSED, str(refusal)

    def gain(self, base: _Standing) -> tuple[float, float | None]:
        """By how much more of the same problems are right than by ``base``, and the standard error of that."""
        theirs = [share for each in base.done[: len(self.done)] for share in each.right]
        return gained([share for each in self.done for share in each.right], theirs)

    def speed(self, base: _Standing) -> float:
        """Relative to ``base``, on the same batches."""
        return sum(each.cpu for each in base.done[: len(self.done)]) / sum(each.cpu for each in self.done)

    def judge(self, base: _Standing, bound: float, last: bool) -> bool:
        """Whether it is within the bound: at the last rung as it is measured, before if it still may be."""
        if self.verdict == GOES_ON:
            difference, error = self.gain(base)
            slack = 0.0 if last else 1.0 if error is None else error
            if difference + slack < -bound - 1e-9:
                self.verdict = WRONG
        return self.verdict == GOES_ON

    def row(self, base: _Standing) -> Row:
        """How it stands."""
        if not self.done:
            return Row(self.name, self.setting, 0, 0.0, 0.0, None, 0.0, 0.0, None, 0.0, self.verdict, self.why)
        ratio = self.speed(base)
        logs = [log(theirs.cpu / mine.cpu) for mine, theirs in zip(self.done, base.done, strict=False)]
        right, log_error = [share for each in self.done for share in each.right], standard_error(logs)
        return Row(
            self.name,
            self.setting,
            len(right),
            fmean(right),
            *self.gain(base),
            sum(each.tokens for each in self.done) / sum(each.seconds for each in self.done),
            ratio,
            None if log_error is None else ratio * log_error,
            sum(each.compile_seconds for each in self.done),
            self.verdict,
            self.why,
        )


def rungs(batches: int, first: int = 1) -> list[int]:
    """Batches of each rung: ``first``, doubled as long as there are more, then all."""
    sizes = []
    while first < batches:
        sizes.append(first)
        first *= 2
    return [*sizes, batches]


def search(
    candidates: Mapping[str, Setting],
    evaluate: Evaluate,
    baseline: tuple[str, Setting],
    batches: Sequence[Any],
    *,
    bound: float = 0.01,
    first: int = 1,
    finalists: int = 4,
    seed: int = 0,
    tell: Callable[[list[Row]], None] = lambda _: None,
) -> list[Row]:
    """Search for the fastest setting within the accuracy bound.

    Args:
        candidates: settings by name.
        evaluate: runs one. All settings run on a batch before any runs on the next, so that what slows the machine for
            a while slows them all.
        baseline: name and setting that accuracy and speed are held against; it is in every rung.
        batches: of problems; the first are those of the first rung.
        bound: by how much the share of right answers may be below the baseline's.
        first: batches of the first rung.
        finalists: settings that are not halved any more.
        seed: of the order in which settings are run.
        tell: called with how the settings of a rung stand behind it, the fastest first; settings that are run to the
            end after the last rung come together.

    Returns:
        Those within the bound on all problems, the fastest first; the baseline is one of them.

    Raises:
        ValueError: the baseline is refused.
    """
    base, order = _Standing(*baseline), random.Random(seed)
    alive = every = [_Standing(*each) for each in candidates.items()]
    for size in rungs(len(batches), first):
        entered, last = [base, *alive], size == len(batches)
        for batch in batches[len(base.done) : size]:
            for each in order.sample(entered, len(entered)):
                if each.verdict == GOES_ON:
                    each.take(evaluate, batch)
            if base.verdict == REFUSED:
                raise ValueError(f"{base.name}: {base.why}")
        alive = _by_speed([each for each in alive if each.judge(base, bound, last)], base)
        if not last:
            kept = max(ceil(len(alive) / 2), finalists)
            for each in alive[kept:]:
                each.verdict = SLOW
            alive = alive[:kept]
        tell(_rows(entered, base))
    again = _run_to_the_end([each for each in every if each.verdict == SLOW], alive, base, evaluate, batches, bound)
    if again:
        tell(_rows(again, base))
    return _rows([base, *alive, *(each for each in again if each.verdict == GOES_ON)], base)


def _run_to_the_end(
    slow: list[_Standing],
    within: list[_Standing],
    base: _Standing,
    evaluate: Evaluate,
    batches: Sequence[Any],
    bound: float,
) -> list[_Standing]:
    """Those of the slow that are faster than all that are within the bound, the fastest first, run on all batches."""
    again: list[_Standing] = []
    for each in _by_speed(slow, base):
        best = max((other.speed(base) for other in (*within, *again) if other.verdict == GOES_ON), default=0.0)
        if each.speed(base) <= best:
            break
        again.append(each)
        each.verdict = GOES_ON
        while len(each.done) < len(batches) and each.judge(base, bound, False):
            each.take(evaluate, batches[len(each.done)])
        each.judge(base, bound, True)
    return again


def _by_speed(settings: Sequence[_Standing], base: _Standing) -> list[_Standing]:
    """The fastest first; last those that were refused before they ran."""
    return sorted(settings, key=lambda each: -each.speed(base) if each.done else 0.0)


def _rows(settings: Sequence[_Standing], base: _Standing) -> list[Row]:
    return [each.row(base) for each in _by_speed(settings, base)]
