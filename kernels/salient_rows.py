"""Which rows turned: those whose similarity with their former selves is below a threshold (DyLLM, arXiv 2603.08026).

How many there are is known on the device alone. A list of them therefore has a capacity, and the count is beside it.
"""

from __future__ import annotations

import torch


def turned_rows(
    similarity: torch.Tensor, threshold: torch.Tensor, active: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the salient ones among the active rows, and how many they are.

    Args:
        similarity: ``[B, Q]`` floating.
        threshold: ``[B, 1]``, strictly below it is salient.
        active: ``[B, Q]`` int64 positions of the active rows; ``tokens`` for no row.
        tokens: the token count ``S``.

    Returns:
        ``[B, Q]`` int64 places, in order, then ``Q``; and ``[B]`` int64.
    """
    count = active.shape[1]
    rows = torch.where(active < tokens, torch.arange(count, device=active.device), count)
    listed = salient_rows(similarity, threshold, rows, count, count)
    return listed, salient_counts(similarity, threshold, rows, count)


def salient_rows(
    similarity: torch.Tensor, threshold: float | torch.Tensor, rows: torch.Tensor, count: int, none: int
) -> torch.Tensor:
    """The rows whose similarity is below ``threshold``, in order; the first ``count`` where there are more.

    Args:
        similarity: ``[B, Q]`` floating; NaN is not below.
        threshold: strictly below it is salient; a number, or ``[B, 1]``.
        rows: ``[B, Q]`` int64 positions; ``none`` where there is no row.
        count: how many are listed, at least 0.
        none: what fills a list behind its rows.

    Returns:
        ``[B, count]`` int64.

    Raises:
        ValueError: shapes or dtypes are not these, or ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count is 0 or more; got {count}")
    salient = _salient(similarity, threshold, rows, none)
    place = salient.cumsum(1) - 1
    target = torch.where(salient & (place < count), place, count)
    return rows.new_full((rows.shape[0], count + 1), none).scatter(1, target, rows)[:, :count]


def salient_counts(
    similarity: torch.Tensor, threshold: float | torch.Tensor, rows: torch.Tensor, none: int
) -> torch.Tensor:
    """``[B]`` int64: how many rows are salient. Arguments and errors as for ``salient_rows``."""
    return _salient(similarity, threshold, rows, none).sum(1)


def _salient(similarity: torch.Tensor, threshold: float | torch.Tensor, rows: torch.Tensor, none: int) -> torch.Tensor:
    if similarity.dim() != 2 or not similarity.dtype.is_floating_point:
        raise ValueError(f"similarity is floating [B, Q]; got {similarity.dtype} {[*similarity.shape]}")
    if rows.dtype != torch.int64 or rows.shape != similarity.shape:
        raise ValueError(f"rows is torch.int64 {[*similarity.shape]}; got {rows.dtype} {[*rows.shape]}")
    return (similarity < threshold) & (rows != none)
