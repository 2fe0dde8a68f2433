"""Which keys and values a block keeps: the statistic of Sparse-dLLM (arXiv 2508.02558, and its authors' code).

    q_h   = mean of the block's rotated queries                      per query head
    s_j   = mean over h of <q_h, k_{h,j}>                            one score a position outside of the block, unscaled
    s_j   = max of s in the window of w positions around j           positions before and behind the block side by side
    kept  = the int(n r) positions with the largest s, n of them outside of the block

in float32 at least. All heads of a layer keep the same positions: where each rank holds some of them, as many as the
others, the mean of ``s`` over the ranks decides.
"""

from __future__ import annotations

import torch

from dllm_compile.compat import group_size
from dllm_compile.core.ranks import summed


def kept_and_fresh(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    block: torch.Tensor,
    outside: torch.Tensor,
    entries: torch.Tensor,
    fresh: torch.Tensor,
    keep_ratio: float,
    kernel_size: int | None,
    group: str | None = None,
) -> torch.Tensor:
    """Positions ``[B, E]`` int64, as many as ``entries`` has: those to keep, then those of the ``fresh`` rows."""
    most = entries.shape[1] - fresh.shape[1]
    return torch.cat([kept_entries(query, key, mask, block, outside, most, keep_ratio, kernel_size, group), fresh], 1)


def kept_entries(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    block: torch.Tensor,
    outside: torch.Tensor,
    most: int,
    keep_ratio: float,
    kernel_size: int | None,
    group: str | None = None,
) -> torch.Tensor:
    """Positions of the entries to keep, best first.

    Args:
        query: ``[B, H, S, h]``, rotated.
        key: ``[B, H or fewer, S, h]``, rotated.
        mask: of attention, bool (may attend) or floating (added), broadcastable to ``[B, H, S, S]``; a key that no
            query of the block may see is never kept, and does not count among the ``n``.
        block: ``[B, b]`` int64 positions of the block; ``S`` for no row.
        outside: ``[B, n]`` int64 positions of the rest, in order; ``S`` for no row.
        most: entries of the result, ``int(n r)`` of the longest sequence.
        keep_ratio: ``r``, 0 to 1.
        kernel_size: ``w``, odd; ``None`` for no pooling.
        group: the process group whose ranks have some of the heads each; ``None`` where they are all here.

    Returns:
        ``[B, most]`` int64; ``S``, "no row", behind those of a sequence that keeps fewer.
    """
    tokens = query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    there, rows = block < tokens, block.clamp(max=tokens - 1)
    heads, width = query.shape[1], query.shape[3]
    at = rows[:, None, :, None].expand(-1, heads, -1, width)
    mean = (query.gather(2, at).to(dtype) * there[:, None, :, None]).sum(2) / there.sum(1).clamp(min=1)[:, None, None]
    grouped = mean.view(mean.shape[0], key.shape[1], -1, width).mean(2)  # of heads that share a key head: it is linear
    score = (grouped.unsqueeze(2) * key.to(dtype)).sum(-1).mean(1)
    if group is not None:
        score = summed(score, group) / group_size(group)
    seen = outside < tokens
    place = outside.clamp(max=tokens - 1)
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        allowed = allowed[(None,) * (4 - allowed.dim())]  # a model may write ``[S, S]``, or ``[H, S, S]``
        allowed = allowed.expand(query.shape[0], -1, tokens, tokens).any(1)
        allowed = allowed.gather(1, rows[..., None].expand(-1, -1, tokens))
        seen = seen & (allowed & there[..., None]).any(1).gather(1, place)
    score = torch.where(seen, score.gather(1, place), -torch.inf)
    if kernel_size is not None:
        side = kernel_size // 2  # ``max_pool1d`` would be compiled for one length
        padded = torch.nn.functional.pad(score, (side, side), value=-torch.inf)
        score = torch.stack([padded[:, i : i + score.shape[1]] for i in range(kernel_size)]).amax(0)
        score = torch.where(seen, score, -torch.inf)
    best = score.topk(most, 1).indices
    count = (seen.sum(1, keepdim=True).double() * keep_ratio).long()
    rank = torch.arange(most, device=best.device)
    return torch.where(rank < count, place.gather(1, best), tokens)
