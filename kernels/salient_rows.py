"""Which rows go on into the MLP and the next layer: those whose contexts drifted (DyLLM, arXiv 2603.08026).

Their number is known only on the device, so the list has a capacity of all active rows, and the number is a second
result.
"""

from __future__ import annotations

import torch


def salient_rows(
    drifted: torch.Tensor, bound: torch.Tensor, active: torch.Tensor, stored: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the salient rows among the active ones, and how many each sequence has.

    Args:
        drifted: ``[B, Q]`` bool, those that are salient by their contexts.
        bound: ``[B, 1]`` floating; where it is infinite, all rows of the sequence are salient.
        active: ``[B, Q]`` int64 positions of the active rows; ``tokens`` for no row.
        stored: the same with ``tokens`` also for rows that leave nothing behind. They are always salient: what was kept
            of them is old.
        tokens: the token count ``S``.

    Returns:
        ``[B, Q]`` int64 places, in order, then ``Q``; and ``[B]`` int64.
    """
    count = active.shape[1]
    salient = (drifted | (bound == torch.inf) | (stored >= tokens)) & (active < tokens)
    target = torch.where(salient, salient.cumsum(1) - 1, count)
    places = torch.arange(count, device=active.device, dtype=torch.int32).expand_as(active)
    empty = active.new_full((active.shape[0], count + 1), count, dtype=torch.int32)
    listed = empty.scatter(1, target, places)  # of int64 Inductor has no kernel on CUDA
    return listed[:, :count].long(), salient.sum(1)
