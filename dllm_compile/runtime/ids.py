"""Read token ids: what is masked, what is readable, which positions a row set has. Pure functions of tensors."""

from __future__ import annotations

import torch

from dllm_compile.interface.plan import with_row_before

from .unchanged import multipliers


def labels(hidden: torch.Tensor) -> torch.Tensor:
    """Number the rows of ``[B, S, d]``: ``[B, S]`` int64, the same where rows are bitwise the same (a 63-bit hash)."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[hidden.element_size()]
    words = hidden.detach().contiguous().view(kind).long()
    return (words * multipliers(words.shape[-1], words.device)).sum(-1) & 0x7FFFFFFFFFFFFFFF


def infer_mask_id(ids: torch.Tensor) -> int | None:
    """The id that ends every sequence at least twice in a row, or ``None``.

    Args:
        ids: ``[B, S]`` ids of a first call, whose response is still all masks.
    """
    if ids.shape[1] < 2:
        return None
    last = ids[:, -1]
    alike = bool((ids[:, -2] == last).all()) and bool((last == last[0]).all())
    return int(last[0]) if alike else None


def readable_rows(masked: torch.Tensor, shift: bool | None) -> torch.Tensor:
    """Rows a sampler can read, ``[B, S]`` bool: masked ones and, unless ``shift`` is False, the row before each."""
    return masked if shift is False else with_row_before(masked)


def positions(rows: torch.Tensor, least: int = 0, empty: bool = True, multiple: int = 1) -> torch.Tensor:
    """Positions ``[B, K]`` int64 of the true entries of a ``[B, S]`` bool, in order; sequences with fewer are padded
    with ``S``.

    Args:
        rows: which rows.
        least: columns that any non-empty index has at least. Code compiled for any number of rows takes two or more.
        empty: whether an index of no rows may have no columns.
        multiple: ``K`` is rounded up to a multiple of this, but is at most ``S``.
    """
    tokens = rows.shape[1]
    if len(rows) == 1:
        where = rows.nonzero()[:, 1].unsqueeze(0)
        most = where.shape[1]
    else:
        most = int(rows.sum(1).max())
        where = torch.where(rows, torch.arange(tokens), tokens).sort(1).values[:, :most]
    wanted = min(-(-most // multiple) * multiple, tokens)
    wanted = max(wanted, least) if wanted or not empty else 0
    if wanted > most:
        where = torch.cat([where, torch.full((len(rows), wanted - most), tokens)], 1)
    return where.contiguous()


def response_rows(ids: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The rows ``[B, S]`` bool that are masked at the first call; for ``[x; x with a masked prompt]`` (guidance), or
    the other way round, those masked in ``x``.
    """
    half = ids.shape[0] // 2
    for x, other in ((slice(half), slice(half, None)), (slice(half, None), slice(half))) if half else ():
        if ids.shape[0] == 2 * half and masks_prompt(ids[other], ids[x], masked[other], masked[x]):
            return torch.cat([masked[x], masked[x]])
    return masked


def masks_prompt(ids: torch.Tensor, others: torch.Tensor, masked: torch.Tensor, response: torch.Tensor) -> bool:
    """Whether ``ids`` are ``others`` with more masks, all of them outside of the ``response``, as a call without the
    condition of guidance has them; ``[B, S]`` each, ``masked`` of ``ids``.
    """
    changed = ids != others
    return bool(changed.any()) and not bool((changed & (~masked | response)).any())


def mask_of_changes(before: torch.Tensor | None, now: torch.Tensor, known: int | None = None) -> int | None:
    """The label that all changed rows had, if several rows had it: what a sampler fills in was the mask.

    Where ids never reach the backend, this tells the mask of a batch that is padded on the right, or masked in its
    middle, at its second call. One row that changes could be an edit, so its label must occur twice.

    Args:
        before, now: ``[B, S]`` labels, or ids, of two consecutive calls of a sequence.
        known: what is taken for the mask so far. Where all changed rows have become it, a text was masked again.

    Returns:
        The label; ``None`` where nothing changed, where changed rows had several labels, or one that occurred once.
    """
    if before is None or before.shape != now.shape:
        return None
    changed = before != now
    filled = torch.unique(before[changed])
    if len(filled) != 1 or int((before == filled).sum()) < 2:
        return None
    if known is not None and bool((now[changed] == known).all()):
        return None
    return int(filled)
