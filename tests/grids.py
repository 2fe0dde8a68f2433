"""Fewer cases than all combinations of what is varied."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases in which every two values of two axes meet; greedy, so not always the fewest."""
    cases = list(product(*(list(axis) for axis in axes)))
    pairs = {case: {(i, j, case[i], case[j]) for i, j in combinations(range(len(axes)), 2)} for case in cases}
    left = set().union(*pairs.values())
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(pairs[case] & left))
        left -= pairs[best]
        chosen.append(best)
    return chosen


def in_turn(axis: Iterable[Any], *others: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Each value of the first axis once, with the values of the others in turn."""
    rest = list(product(*(list(other) for other in others)))
    return [(value, *rest[i % len(rest)]) for i, value in enumerate(axis)]
