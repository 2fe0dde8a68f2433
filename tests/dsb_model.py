"""DSB for one sequence, spelled out: a block that slides, a window of rows before it, and its sampler.

METHODS.md 17.6, from arXiv 2602.05992 and its authors' code: ``s`` is the first masked position and ``e`` the end of
the block. A step runs the rows from ``s - w`` to ``e``, where ``w`` is the window, or as far as ``s`` has just moved
where that is more. Every row runs at the start, and again as soon as a block's length of tokens was filled since.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .dkv_model import CachedRows, Step


def sample_dsb(
    model: Any,
    ids: torch.Tensor,
    mask_id: int,
    *,
    prompt: int,
    block: int,
    window: int = 24,
    threshold: float = 0.9,
    constant: bool = False,
) -> Iterator[Step]:
    """Fill the masks ``[L]`` behind a prompt: at each step all in the block that are sure, or the surest one."""
    rows, ids = CachedRows(model, ids.shape[0]), ids.clone()
    length = ids.shape[0]
    start, end, decoded, since, moved = prompt, min(prompt + block, length), 0, block, 0
    while decoded < length - prompt:
        run = torch.zeros_like(ids, dtype=torch.bool)
        if since >= block:
            run[:], since = True, 0
        else:
            run[max(start - max(moved, window), 0) : end] = True
        logits = rows(ids, run)
        chances, best = torch.zeros(length, dtype=logits.dtype), torch.zeros_like(ids)
        chances[run], best[run] = logits.softmax(-1).max(-1)
        candidates = ids == mask_id
        candidates[end:] = False
        chances = torch.where(candidates, chances, -torch.inf)
        taken = candidates & (chances >= threshold)
        taken[chances.argmax()] = True
        ids[taken] = best[taken]
        decoded, since = decoded + int(taken.sum()), since + int(taken.sum())
        left = (ids == mask_id).nonzero()[:, 0].tolist()
        moved = (left[0] if left else end) - start
        start += moved
        end = min(start + block if constant else prompt + block + decoded, length)
        yield Step(run, logits, ids.clone())
