"""Sizes that may be any in compiled code: the number of sequences, of tokens, of rows in a set."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch

from .layout import Layout, opened

BATCH, TOKENS = "batch", "tokens"


class Size(NamedTuple):
    """The product of some numbers that have a name, times ``times``, plus ``plus``."""

    names: tuple[str, ...]
    times: int = 1
    plus: int = 0


Extent: TypeAlias = "Size | int"


def of_layout(layout: Layout, rows: str = TOKENS) -> tuple[Extent, ...]:
    """Extents of a value with this layout, whose rows are a set of this name."""
    out: list[Extent] = []
    for dim in opened(layout):
        names = tuple(rows if factor.kind == "T" else BATCH for factor in dim if not factor.size)
        times = prod(factor.size for factor in dim if factor.size)
        out.append(Size(names, times) if names else times)
    return tuple(out)


def of_constant(value: torch.Tensor, batch: int, tokens: int) -> tuple[Extent, ...]:
    """Extents of a tensor that does not depend on the tokens, told by their values; of weights, as they are.

    A size that is the token count by chance comes out fixed when code is compiled for it.
    """
    if type(value) is torch.nn.Parameter:
        return tuple(value.shape)
    out: list[Extent] = []
    for i, extent in enumerate(value.shape):
        many = extent > 1
        if many and extent == batch and (i == 0 or batch != tokens):
            out.append(Size((BATCH,)))
        else:
            out.append(Size((TOKENS,)) if many and extent == tokens else int(extent))
    return tuple(out)


def order(value: torch.Tensor) -> tuple[Any, ...]:
    """How a tensor lies in memory, whatever its sizes: its dimensions by stride, those of one entry left out."""
    wide = [i for i, extent in enumerate(value.shape) if extent > 1]
    still = [i for i in wide if value.stride(i) == 0]
    strides = value.stride()
    return tuple(sorted(wide, key=lambda i: -strides[i])), tuple(still)


def packed(value: torch.Tensor) -> Sequence[bool]:
    """Of each dimension, whether its stride is the product of the smaller ones, as of a copy or a broadcast one."""
    found = [True] * value.dim()
    expected = 1
    for i in reversed(order(value)[0]):
        if value.stride(i) == 0:
            continue
        found[i] = value.stride(i) == expected
        expected = value.stride(i) * value.shape[i]
    return found
