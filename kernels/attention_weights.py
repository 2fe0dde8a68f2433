"""Attention weights, the mean over heads: plain PyTorch, compiled with the layer that asks for them.

w = mean over heads of softmax(scale q k^T + mask)
"""

from __future__ import annotations

import torch


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Attention weights, the mean over heads.

    Args:
        query: ``[B, H, Q, h]``, floating.
        key: ``[B, H or fewer, K, h]``; each key head serves as many query heads as the next.
        mask: bool (may attend) or floating (added), broadcastable to ``[B, H, Q, K]``; ``None`` for none.
        scale: of the scores, ``1 / sqrt(h)`` by default.

    Returns:
        ``[B, Q, K]``, float64 for float64 input, else float32. A query that sees no key is NaN.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, rows, width = query.shape
    groups = query.to(dtype).reshape(batch, key.shape[1], heads // key.shape[1], rows, width)
    scores = groups @ key.to(dtype).transpose(-1, -2).unsqueeze(2) * (width**-0.5 if scale is None else scale)
    scores = scores.reshape(batch, heads, rows, key.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).mean(1)
