"""Row sets and the two conversions between them.

A *row* is one token position of one sequence. Each token-wise value of a graph carries a row set, the rows that are
computed in this step. ``gather_rows`` narrows a value to fewer rows; ``merge_rows`` widens it again by writing the
fresh rows into the state and reading the rest from there. An index is ``[B, K]`` int64 of token positions; ``S``, one
past the last token, stands for "no row": it reads the last token and writes to a spare row that every state tensor
has.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from .layout import Factor, Layout


@dataclass(frozen=True)
class RowSet:
    """The rows a value is computed for, as a type.

    Attributes:
        name: what the set is called in ``explain`` and which index it reads at run time.
        parent: a set that holds all its rows, or ``None`` when only ``ALL`` is known to.
    """

    name: str
    parent: RowSet | None = None

    def within(self, other: RowSet) -> bool:
        """Whether every row of this set is known to be in ``other``."""
        return other == ALL or self in (NONE, other) or (self.parent is not None and self.parent.within(other))


ALL = RowSet("all")
NONE = RowSet("none")


def join(a: RowSet, b: RowSet) -> RowSet:
    """The smallest known set that holds both."""
    if a.within(b):
        return b
    return a if b.within(a) else ALL


def rows_first(x: torch.Tensor, layout: Layout, batch: int = 0) -> torch.Tensor:
    """Bring a tensor to ``[B, T, ...]``. Missing leading dimensions of ``x`` count as size 1.

    Args:
        x: with any number of tokens.
        layout: of its dimensions.
        batch: sequences, where ``layout`` leaves it open.
    """
    x = x.reshape((1,) * (len(layout) - x.dim()) + tuple(x.shape))
    split: list[int] = []
    factors: list[Factor] = []
    for extent, dim in zip(x.shape, layout, strict=True):
        if len(dim) == 1:
            factors.append(dim[0])
            split.append(extent)
            continue
        sizes = [batch if (factor.kind, factor.size) == ("B", 0) else factor.size for factor in dim]
        known = prod(n for n, factor in zip(sizes, dim, strict=True) if factor.kind != "T")
        factors += dim
        split += [extent // known if factor.kind == "T" else n for n, factor in zip(sizes, dim, strict=True)]
    kinds = [factor.kind for factor in factors]
    return x.reshape(split).movedim((kinds.index("B"), kinds.index("T")), (0, 1))


def rows_back(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Inverse of :func:`rows_first`, for any number of rows."""
    kinds = [factor.kind for dim in layout for factor in dim]
    x = rows.movedim((0, 1), (kinds.index("B"), kinds.index("T")))
    if all(len(dim) == 1 for dim in layout):
        return x
    sizes = iter(x.shape)
    merged: list[int] = []
    for dim in layout:
        extent = 1
        for _ in dim:
            extent *= next(sizes)
        merged.append(extent)
    return x.reshape(merged)


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[b, index[b, k]]``; a batch of one row source serves every sequence."""
    if rows.shape[0] == 1:
        return rows[0][index]
    return rows[torch.arange(rows.shape[0], device=rows.device).unsqueeze(1), index]


def gather_rows(x: torch.Tensor, index: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Narrow: the rows ``index`` of ``x``, in the layout of ``x``.

    Args:
        x: a tensor whose batch and token axes ``layout`` names.
        index: ``[B, K]`` int64 row numbers in ``x``; larger ones read the last row.
        layout: where the batch and token axes are.

    Returns:
        ``x`` with ``K`` in place of its token count.
    """
    return rows_back(take_rows(x, index, layout), layout)


def read_rows(state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` ``[B, K]`` of a state tensor ``[B, S + 1, ...]``, as ``[B, K, ...]``."""
    return _take(state, index)


def merge_rows(state: torch.Tensor, index: torch.Tensor, fresh: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Widen: write ``fresh`` into ``state`` at ``index`` and return all ``S`` rows in the layout of ``fresh``.

    Args:
        state: ``[B, S + 1, ...]``, changed in place.
        index: ``[B, K]`` int64; ``S`` writes to the spare row.
        fresh: the computed rows, in ``layout`` with ``K`` tokens.
        layout: where the batch and token axes are.
    """
    batch = torch.arange(state.shape[0], device=state.device).unsqueeze(1)
    state.index_put_((batch, index), rows_first(fresh, layout, state.shape[0]).to(state.dtype))
    return read_all(state, layout)


def words(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` ``[..., N]`` as int64 ``[..., n]`` without a copy, where whole words make them up; else as they are.

    Code that PyTorch has compiled moves rows number by number: of bfloat16 it is four times as fast so.
    """
    each = max(8 // rows.element_size(), 1)
    steps = (*rows.stride()[:-1], rows.shape[-1], rows.storage_offset())
    return rows.view(torch.int64) if rows.stride(-1) == 1 and not any(step % each for step in steps) else rows


def put_rows(state: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows in place, outside of compiled code.

    Args:
        state: ``[B, N, ...]`` contiguous.
        index: ``[B, K]`` int64, below ``N``; where a number comes twice, either row may be the one that stays.
        rows: ``[B, K, ...]``.
    """
    batch, count = state.shape[:2]
    at = index + count * torch.arange(batch, device=index.device).unsqueeze(1)
    into = state.view(batch * count, -1)
    given = rows.reshape(at.numel(), into.shape[1])
    whole = words(into), words(given)
    into, given = whole if whole[0].dtype == whole[1].dtype else (into, given)
    into.index_copy_(0, at.view(-1), given)


def store_rows(state: torch.Tensor, fresh: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Write all ``S`` rows of ``fresh`` into ``state`` ``[B, S + 1, ...]`` in place; returns ``fresh``."""
    rows = rows_first(fresh, layout, state.shape[0])
    state[:, : rows.shape[1]].copy_(rows)
    return fresh


def read_all(state: torch.Tensor, layout: Layout) -> torch.Tensor:
    """All ``S`` rows of a state tensor ``[B, S + 1, ...]``, in ``layout``."""
    return rows_back(state[:, : state.shape[1] - 1], layout)


def take_rows(x: torch.Tensor, index: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows ``index`` ``[B, K]`` of ``x`` as ``[B, K, ...]``; a number past the last reads the last."""
    rows = rows_first(x, layout, index.shape[0])
    return _take(rows, index.clamp(max=rows.shape[1] - 1))


def keep_rows(state: torch.Tensor, x: torch.Tensor, index: torch.Tensor, layout: Layout) -> None:
    """Overwrite a state tensor ``[B, K + 1, ...]`` with the rows ``index`` ``[B, K]`` of ``x``."""
    state[:, : index.shape[1]].copy_(take_rows(x, index, layout))


def changed_rows(state: torch.Tensor, index: torch.Tensor, fresh: torch.Tensor, layout: Layout) -> torch.Tensor:
    """How far ``fresh`` rows are from those in ``state`` at ``index`` ``[B, K]``, in the layout of ``fresh``."""
    return rows_back(rows_first(fresh, layout, index.shape[0]) - _take(state, index), layout)


def former_rows(state: torch.Tensor, index: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows ``index`` ``[B, K]`` of ``state`` in ``layout``."""
    return rows_back(_take(state, index), layout)


def replace_rows(
    state: torch.Tensor, index: torch.Tensor, places: torch.Tensor, fresh: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """Rows ``index`` ``[B, K]`` of ``state`` in ``layout``, those at ``places`` ``[B, n]`` replaced by ``fresh``.

    The state stays as it is. A place of ``K`` or more is no row.
    """
    count = index.shape[1]
    spare = state[:, -1:]
    rows = torch.cat([_take(state, index), spare], 1)
    batch = torch.arange(index.shape[0], device=state.device).unsqueeze(1)
    rows.index_put_((batch, places.clamp(max=count)), rows_first(fresh, layout, index.shape[0]).to(rows.dtype))
    return rows_back(rows[:, :count], layout)


def pick_index(index: torch.Tensor, picked: torch.Tensor, none: int) -> torch.Tensor:
    """``index`` ``[B, K]`` at the places ``picked`` ``[B, n]``; ``none`` where the place is no row (``K`` or more)."""
    found = index.gather(1, picked.clamp(max=index.shape[1] - 1))
    return torch.where(picked < index.shape[1], found, none)


def spare(state: torch.Tensor) -> int:
    """The number of the spare row of a state tensor, which takes what is written for "no row"."""
    return state.shape[1] - 1


def mask_keys(mask: torch.Tensor | None, index: torch.Tensor, tokens: int) -> torch.Tensor:
    """An attention mask for the keys at ``index``.

    Args:
        mask: ``[B or 1, H or 1, Q or 1, S]``, bool (may attend) or floating (added); ``None`` for none.
        index: ``[B, K]`` int64 positions of the keys; ``tokens``, "no row", is hidden.
        tokens: the token count ``S``.

    Returns:
        ``[B, H or 1, Q or 1, K]``.
    """
    there = (index < tokens)[:, None, None, :]
    if mask is None:
        return there
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).expand(index.shape[0], -1, -1, tokens)
    at = index.clamp(max=tokens - 1)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    mask = mask.gather(3, at)
    return _only(mask, there)


def _only(mask: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """``mask``, bool (may attend) or floating (added), with the keys hidden that are not in ``there``, bool."""
    return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, -torch.inf)


def hide_keys(mask: torch.Tensor | None, visible: torch.Tensor) -> torch.Tensor:
    """An attention mask that also hides the keys outside of ``visible``.

    Args:
        mask: ``[B or 1, H or 1, Q or 1, S]`` or its last dimensions, bool (may attend) or floating (added).
        visible: ``[B, S]`` bool.

    Returns:
        ``[B, H or 1, Q or 1, S]``.
    """
    there = visible[:, None, None, :]
    if mask is None:
        return there
    return _only(mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)), there)


def visible_entries(entries: torch.Tensor, visible: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions ``[B, E]`` int64 of entries; ``tokens``, "no row", for those not in ``visible`` ``[B, S]`` bool."""
    seen = visible.gather(1, entries.clamp(max=tokens - 1))
    return torch.where(seen, entries, tokens)


def other_rows(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions ``[B, S]`` int64: ``s`` at place ``s``, but ``tokens``, "no row", for those in ``index`` ``[B, K]``."""
    every = torch.arange(tokens + 1, device=index.device).expand(index.shape[0], -1)
    return every.scatter(1, index, tokens)[:, :tokens].contiguous()


def positions_of(picked: torch.Tensor, response: torch.Tensor, counts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions ``[B, n]`` of picked response rows; ``tokens`` ("no row") beyond a sequence's own count.

    Args:
        picked: ``[B, n]`` int64, numbers of response rows, most changed first.
        response: ``[B, G]`` int64 positions of the response.
        counts: ``[B, 1]`` int64, how many of the ``n`` a sequence may use.
        tokens: the token count ``S``.
    """
    slot = torch.arange(picked.shape[1], device=picked.device)
    return torch.where(slot < counts, response.gather(1, picked), tokens)
