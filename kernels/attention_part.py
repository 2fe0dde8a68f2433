"""Attention over a part of the keys, with what is needed to join it to the attention over the others.

    L_i = log sum_j exp(scale <q_i, k_j> + mask_ij)                    over the keys j of the part that query i sees
    C_i = sum_j exp(scale <q_i, k_j> + mask_ij - L_i) v_j
    joined C = (e^{L_1} C_1 + e^{L_2} C_2) / (e^{L_1} + e^{L_2})       over both parts: exact but for rounding

(Flash-Decoding, 2023, and FlashBlock, arXiv 2602.05305.) A query that sees no key of a part has L = -inf and C = 0
there, and adds nothing. Where it sees no key of either part, the joined context is 0, as that of
``scaled_dot_product_attention`` is. A query whose mask is the least finite number at every key of both parts gets the
mean of the two: a padded row, whose result nobody reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dllm_compile.core.rows import mask_keys
from dllm_compile.kernels.operation import operation
from dllm_compile.kernels.sparse_attention import Arguments, attention_flops, check, has_kernel

Part = tuple[torch.Tensor, torch.Tensor]
"""Contexts ``[B, H, Q, h_v]`` and their log-sum-exps ``[B, H, Q]``, float64 for float64 input, else float32."""


def attention_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor | None,
    tokens: int,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> Part:
    """Attention of each query over the entries at ``positions``, and the log-sum-exp of its scores. Has no gradient.

    Arguments and errors as for :func:`dllm_compile.kernels.sparse_attention.sparse_attention`.

    Returns:
        :data:`Part`.
    """
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    check(Arguments(query, key, value, positions, tokens, mask, scale))
    context, total = torch.ops.dllm.attention_part(query, key, value, positions, tokens, mask, scale)
    return context, total


def reference(given: Arguments) -> Part:
    """The op. A CPU has a fused one, which makes no score of all rows and all keys at once.

    Arguments and result as for ``attention_part``.
    """
    query, key, value, positions, tokens, mask, scale = given
    if positions is not None:
        mask = mask_keys(mask, positions, tokens)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if query.device.type == "cpu" and query.shape[3] == value.shape[3]:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        context, total = fused(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        context = context.to(dtype)
    else:
        context, total = _spelled_out(query.to(dtype), key.to(dtype), value.to(dtype), mask, scale)
    if mask is not None:  # torch 2.13 calls the log-sum-exp of nothing 0
        total = total.masked_fill((mask == -torch.inf).all(3), -torch.inf)
    return context, total


def _spelled_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> Part:
    """The formula, with the scores ``[B, H, Q, E]``; query heads that share a key head are rows of one product."""
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    query = (query * (width**-0.5 if scale is None else scale)).reshape(batch, groups, heads // groups * rows, width)
    scores = (query @ key.mT).view(batch, heads, rows, key.shape[2])
    scores = scores if mask is None else scores + mask
    most = scores.amax(3, keepdim=True)
    weights = (scores - most.masked_fill(most == -torch.inf, 0)).exp()
    total = weights.sum(3, keepdim=True)
    weights = (weights / total.masked_fill(total == 0, 1)).view(batch, groups, heads // groups * rows, -1)
    return (weights @ value).view(batch, heads, rows, -1), (most + total.log()).squeeze(3)


@operation("attention_part", attention_part)
def _attention_part(*arguments: Any) -> Part:
    """``reference`` on a CPU, and for what the Triton kernel does not take; else that, on CUDA."""
    given = Arguments(*arguments)
    if not has_kernel(given.query, given.value):
        return reference(given)
    from dllm_compile.kernels.sparse_attention_triton import launch_part

    return launch_part(given)


register_flop_formula(torch.ops.dllm.attention_part)(attention_flops)


def shared_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    tokens: int,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> Part:
    """:func:`attention_part` of several sequences over the entries of one: their queries are rows of one product.

    Args:
        query: ``[D, H, Q, h]``.
        key, value: ``[1, Hkv, E, h]`` and ``[1, Hkv, E, h_v]``.
        positions: ``[D, E]`` int64, the same for all.
        tokens, scale: as there.
        mask: ``[D or 1, H or 1, Q or 1, S]``, the same for all.

    Returns:
        :data:`Part` of ``D`` sequences.
    """
    drafts, heads, rows, width = query.shape
    folded = query.transpose(0, 1).reshape(1, heads, drafts * rows, width)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))[:1]
        mask = mask if mask.shape[2] == 1 else mask.repeat(1, 1, drafts, 1)
    context, total = attention_part(folded, key, value, positions[:1], tokens, mask, scale)
    context = context.view(heads, drafts, rows, context.shape[3]).transpose(0, 1)
    return context, total.view(heads, drafts, rows).transpose(0, 1)


def joined(
    one: torch.Tensor, one_total: torch.Tensor, two: torch.Tensor, two_total: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Contexts ``[B, H, Q, h_v]`` of ``dtype`` over the keys of two parts; see :data:`Part`.

    Their memory is ``[B, Q, H, h_v]``, as the next projection reads it.
    """
    one, one_total, two, two_total = (each.transpose(1, 2) for each in (one, one_total, two, two_total))
    most = torch.maximum(one_total, two_total)
    most = most.masked_fill(most == -torch.inf, 0)
    weights = (one_total - most).exp().unsqueeze(3), (two_total - most).exp().unsqueeze(3)
    total = weights[0] + weights[1]
    context = (weights[0] * one + weights[1] * two) / total.masked_fill(total == 0, 1)
    return context.to(dtype).transpose(1, 2)


def kept_part(contexts: torch.Tensor, totals: torch.Tensor, places: torch.Tensor) -> Part:
    """Read the kept contexts and log-sum-exps of the rows at ``places``.

    Args:
        contexts: ``[B, K + 1, H, h_v]``, the last row for what belongs to no row.
        totals: ``[B, K + 1, H]``, their log-sum-exps.
        places: ``[B, Q]`` int64; ``K`` for a row of which nothing is kept.

    Returns:
        :data:`Part`; nothing seen, where nothing is kept.
    """
    batch = torch.arange(places.shape[0], device=places.device).unsqueeze(1)
    none = places >= contexts.shape[1] - 1
    found = totals[batch, places].masked_fill(none.unsqueeze(2), -torch.inf)
    return contexts[batch, places].transpose(1, 2), found.transpose(1, 2)


def renewed_part(
    contexts: torch.Tensor,
    totals: torch.Tensor,
    places: torch.Tensor,
    context: torch.Tensor,
    total: torch.Tensor,
    renew: torch.Tensor,
) -> Part:
    """Replace what is kept by what was computed now, in the sequences that renew it.

    Args:
        contexts, totals, places: see :func:`kept_part`; the first two are changed in place.
        context, total: of the rows at ``places``, computed now; see :data:`Part`.
        renew: ``[B, 1]`` bool, the sequences that keep these.

    Returns:
        :data:`Part`: what is kept from here on; for a row of which nothing is kept, what was computed now.
    """
    former = kept_part(contexts, totals, places)
    new = (renew | (places >= contexts.shape[1] - 1)).unsqueeze(1)
    context = torch.where(new.unsqueeze(3), context, former[0])
    total = torch.where(new, total, former[1])
    batch = torch.arange(places.shape[0], device=places.device).unsqueeze(1)
    contexts.index_put_((batch, places), context.transpose(1, 2))
    totals.index_put_((batch, places), total.transpose(1, 2))
    return context, total
