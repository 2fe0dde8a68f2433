"""Which rows changed most: the statistic that dLLM-Cache selects by.

    c_i = <new_i, old_i> / (max(|new_i|, eps) max(|old_i|, eps)),    eps = 1e-8    (arXiv 2506.06295, "V-verify")

over everything a row holds (all key-value heads). The authors take it in the model's dtype; here it is taken in float32
at least, because in bfloat16 a cosine near 1 has a handful of values and the choice is then mostly the order of ties.
Where each rank holds some of the heads, the three products are summed over the ranks.
"""

from __future__ import annotations

import torch

from dllm_compile.core.ranks import summed


def row_change(new: torch.Tensor, old: torch.Tensor, group: str | None = None) -> torch.Tensor:
    """Cosine of each row of ``new`` with the same row of ``old``.

    Args:
        new, old: ``[B, K, ...]``, any floating dtype; the dimensions behind ``K`` are one vector.
        group: the process group whose ranks have a part of each vector; ``None`` where it is whole.

    Returns:
        ``[B, K]``, float64 for float64 input, else float32.
    """
    dtype = torch.promote_types(new.dtype, torch.float32)
    a, b = new.flatten(2).to(dtype), old.flatten(2).to(dtype)
    sums = (a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1)
    dot, now, before = sums if group is None else summed(torch.stack(sums), group).unbind()
    return dot / (now.sqrt().clamp(min=1e-8) * before.sqrt().clamp(min=1e-8))


def pick_rows(
    new: torch.Tensor,
    old: torch.Tensor,
    response: torch.Tensor,
    tokens: int,
    count: int,
    group: str | None = None,
) -> torch.Tensor:
    """The ``count`` rows of each sequence that turned most, most turned first.

    Args:
        new, old: ``[B, G, ...]`` values of the response rows, now and at the step before.
        response: ``[B, G]`` int64 positions; ``tokens`` where a shorter response has no row, which is picked last.
        tokens: the token count ``S``.
        count: how many, at most ``G``.
        group: see :func:`row_change`.

    Returns:
        ``[B, count]`` int64 numbers in ``0 .. G - 1``.
    """
    change = torch.where(response < tokens, row_change(new, old, group), torch.inf)
    return torch.topk(change, count, dim=1, largest=False).indices
