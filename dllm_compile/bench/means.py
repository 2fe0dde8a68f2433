"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; ``None`` of fewer than two."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def gained(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """By how much the mean of ``mine`` is above that of ``theirs``, value by value of the same problems, and the
    standard error of that; ``None`` of one problem.
    """
    gains = [float(a) - float(b) for a, b in zip(mine, theirs, strict=True)]
    return fmean(gains), standard_error(gains)
