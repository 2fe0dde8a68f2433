"""Open sizes in compiled code: the number of sequences, of tokens, of rows in a set."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, TypeAlias

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


def of_constant(value: torch.Tensor, batch: int, tokens: int, name: str = "") -> tuple[Extent, ...]:
    """Extents of a tensor that does not depend on the tokens; of weights, as they are.

    An extent that is the number of tokens or of sequences now may be so by chance, so it has a name of its own that
    begins with ``name``: what the compiler takes for granted of it is seen to at each call.
    """
    if type(value) is torch.nn.Parameter:
        return tuple(value.shape)
    numbers = {n for n in (batch, tokens) if n > 1}
    return tuple(Size((f"{name}:{i}",)) if n in numbers else int(n) for i, n in enumerate(value.shape))


PACKED, SPARE, BROADCAST = -1, -2, 0


def form(value: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """How a tensor lies in memory, whatever its sizes.

    Returns:
        Its dimensions of more than one entry by stride, the smallest first, and of each how its stride is told:
        ``PACKED``, the product of the smaller sizes; ``SPARE``, as if the dimension before had one entry more, as rows
        without the spare one of the state have; ``BROADCAST``, 0; else the stride itself.
    """
    out: list[tuple[int, int]] = []
    below, last = 1, None
    for i in sorted((i for i, n in enumerate(value.shape) if n > 1), key=lambda i: (value.stride(i), -i)):
        stride = value.stride(i)
        if stride == 0:
            out.append((i, BROADCAST))
            continue
        spare = last is not None and stride == (value.shape[last] + 1) * value.stride(last)
        out.append((i, PACKED if stride == below else SPARE if spare else stride))
        below, last = stride * value.shape[i], i
    return tuple(out)
