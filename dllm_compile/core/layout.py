"""Where the batch and the tokens sit in a tensor.

A layout gives, for each dimension, the factors its size is a product of, outermost first. ``[B, S, d]`` is
``((B,), (T,), (d,))``; after ``view(B * S, d)`` it is ``((B, T), (d,))``. Following factors instead of sizes keeps 512
tokens apart from a width of 512. This file is arithmetic on tuples and knows no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class Factor(NamedTuple):
    """``kind`` is ``"B"`` (batch), ``"T"`` (tokens) or ``""`` (anything else); ``size`` is its extent, 0 for any."""

    kind: str
    size: int


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


def plain(size: int) -> Dim:
    """A dimension that holds neither batch nor tokens."""
    return (Factor("", size),)


def size(dim: Dim) -> int:
    """Extent of a dimension."""
    return prod(factor.size for factor in dim)


def holds(dim: Dim, kind: str) -> bool:
    """Whether a dimension contains the batch (``"B"``) or the tokens (``"T"``)."""
    return any(factor.kind == kind for factor in dim)


def position(layout: Layout, kind: str) -> int | None:
    """The dimension that contains ``kind``, or ``None``."""
    return next((i for i, dim in enumerate(layout) if holds(dim, kind)), None)


def opened(layout: Layout) -> Layout:
    """The same for any number of tokens, and for any batch of two or more: their sizes are 0."""
    return tuple(tuple(Factor(f.kind, 0) if f.kind and f.size > 1 else f for f in dim) for dim in layout)


def is_open(dim: Dim) -> bool:
    """Whether the extent of a dimension depends on a size that may be any."""
    return any(factor.size == 0 for factor in dim)


def regroup(layout: Layout, sizes: Sequence[int]) -> Layout | None:
    """Layout after a ``view`` to ``sizes``; ``None`` when the view would split the batch or the token axis."""
    rest = [factor for dim in layout for factor in dim]
    out: list[Dim] = []
    for want in sizes:
        group: list[Factor] = []
        have = 1
        if want == 1 and rest and rest[0].size == 1:
            group.append(rest.pop(0))
        while have < want:
            if not rest:
                return None
            head = rest[0]
            missing = want // have
            if missing % head.size == 0:
                group.append(rest.pop(0))
                have *= head.size
            elif head.kind == "" and head.size % missing == 0:
                group.append(Factor("", missing))
                rest[0] = Factor("", head.size // missing)
                have = want
            else:
                return None
        if have != want:
            return None
        out.append(_merged(group))
    if any(factor.size != 1 for factor in rest):
        return None
    if rest and out:
        out[-1] = _merged([*out[-1], *rest])
    return tuple(out)


def _merged(group: Sequence[Factor]) -> Dim:
    """Join neighboring plain factors, so that equal layouts compare equal."""
    out: list[Factor] = []
    for factor in group:
        if factor.kind == "" and out and out[-1].kind == "":
            out[-1] = Factor("", out[-1].size * factor.size)
        elif factor.kind != "" or factor.size != 1:
            out.append(factor)
    return tuple(out) or plain(1)
