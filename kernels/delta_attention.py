"""Attention of a step after another one: exact for the rows that turned, corrected for the rest.

DyLLM (arXiv 2603.08026). With the keys and values of the salient rows replaced, and over all keys,

    p_ij = softmax_j(scale <q_i, k_j> + mask_ij)
    C_i  = sum_j p_ij v_j                                      rows ``i`` that are salient
    C_i  = c_i + sum over salient j of p_ij (v_j - vold_j)     the others, ``c`` the contexts of the step before
    similarity_i = <C_i, c_i> / sqrt(max(|C_i|^2, 1e-8) max(|c_i|^2, 1e-8))      over all heads side by side

What is left out for the others is ``sum_j (p_ij - pold_ij) vold_j``. The weights need every score, but the product with
the values is made for the salient rows alone, and a correction reads the weights of the salient columns alone.

A row whose keys are all masked has no weights: it is 0 where salient, as of ``F.scaled_dot_product_attention``, and
``c_i`` elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from dllm_compile.core.ranks import summed
from dllm_compile.kernels.operation import on_cuda, operation

Parts = tuple[torch.Tensor, torch.Tensor]
Shape = tuple[int, ...]


class Arguments(NamedTuple):
    """Arguments of the operation; see ``delta_attention``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    change: torch.Tensor
    at_keys: torch.Tensor
    at_queries: torch.Tensor
    context: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None


def delta_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    change: torch.Tensor,
    at_keys: torch.Tensor,
    at_queries: torch.Tensor,
    context: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    group: str | None = None,
) -> Parts:
    """Contexts of ``Q`` rows, and how far each kept its direction. Has no gradient.

    Args:
        query: ``[B, H, Q, h]``, rotated, ``Q`` at least 1. Like all but ``mask`` float64, float32, bfloat16 or
            float16, of any strides.
        key, value: ``[B, Hkv, L, h]`` and ``[B, Hkv, L, h_v]``, the salient ones replaced; ``Hkv`` divides ``H``,
            ``L`` is at least 1.
        change: ``[B, n, Hkv, h_v]``, new less old values of the salient rows; ``n`` at least 0.
        at_keys: ``[B, n]`` int64, their places among the keys; any other number: no row.
        at_queries: ``[B, n]`` int64, places of the salient rows among the queries, each at most once; any other
            number: no row.
        context: ``[B, H, Q, h_v]``, of the step before.
        mask: bool (may attend) or floating (added), broadcastable to ``[B, H, Q, L]``.
        scale: of the scores, ``h ** -0.5`` by default.
        group: the process group whose ranks have some of the heads each; ``None`` where they are all here.

    Returns:
        New contexts ``[B, H, Q, h_v]`` of the dtype of ``context``, and the similarity ``[B, Q]``, float64 for float64
        input, else float32, taken before the contexts are rounded, and of shards behind that.

    Raises:
        ValueError: shapes or dtypes are not these.
    """
    given = Arguments(query, key, value, change, at_keys, at_queries, context, mask, scale)
    _check_tensors(given)
    _check_rows(given)
    new, similarity = torch.ops.dllm.delta_attention(*given)
    if group is not None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        similarity = cosine(summed(_products(new.to(dtype), context.to(dtype)), group))
    return new, similarity


def _check_tensors(given: Arguments) -> None:
    """Check that tensors have four dimensions whose sizes agree, and one floating dtype."""
    query, key, value, change, _, _, context, *_ = given
    tensors = {"query": query, "key": key, "value": value, "change": change, "context": context}
    for name, x in tensors.items():
        if x.dim() != 4 or x.dtype != query.dtype or not x.dtype.is_floating_point:
            raise ValueError(f"{name} is floating of 4 dimensions, like query {query.dtype}; got {_shown(x)}")
    batch, heads, rows, width = query.shape
    groups, keys, out = key.shape[1], key.shape[2], value.shape[3]
    if rows < 1:
        raise ValueError(f"query has 1 row or more; got {_shown(query)}")
    if keys < 1 or groups < 1 or heads % groups:
        raise ValueError(f"key has 1 position or more, and heads that divide the query's {heads}; got {_shown(key)}")
    wanted = {
        "key": (batch, groups, keys, width),
        "value": (batch, groups, keys, out),
        "change": (batch, change.shape[1], groups, out),
        "context": (batch, heads, rows, out),
    }
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} is {[*shape]} for query {[*query.shape]}; got {_shown(tensors[name])}")


def _check_rows(given: Arguments) -> None:
    """Check that places are ``[B, n]`` and that the mask broadcasts to the scores."""
    query, key, _, change, at_keys, at_queries, _, mask, _ = given
    for name, at in {"at_keys": at_keys, "at_queries": at_queries}.items():
        if at.dtype != torch.int64 or at.shape != change.shape[:2]:
            raise ValueError(f"{name} is torch.int64 {[*change.shape[:2]]}, as change is; got {_shown(at)}")
    if mask is None:
        return
    scores = (*query.shape[:3], key.shape[2])
    fits = mask.dim() <= 4 and all(a in (1, b) for a, b in zip(reversed(mask.shape), reversed(scores), strict=False))
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(f"mask is bool or floating and broadcasts to {[*scores]}; got {_shown(mask)}")


def _shown(x: torch.Tensor) -> str:
    return f"{x.dtype} {[*x.shape]}"


def cosine(sums: torch.Tensor) -> torch.Tensor:
    """Similarity of ``[3, ...]``: the product of two vectors, and the square of each."""
    dot, new, old = sums.unbind(0)
    return dot / (new.clamp(min=1e-8).sqrt() * old.clamp(min=1e-8).sqrt())


def _products(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The three sums that :func:`cosine` is computed from, ``[3, B, Q]``, over all heads side by side."""
    return torch.stack([(a * b).sum((1, 3)) for a, b in ((new, old), (new, new), (old, old))])


def salient_slots(at_queries: torch.Tensor, rows: int) -> torch.Tensor:
    """``[B, rows]`` int64: the place of each query in ``at_queries``; ``n`` for a query that is not in it."""
    batch, count = at_queries.shape
    number = torch.ones_like(at_queries).cumsum(1) - 1
    target = torch.where((at_queries >= 0) & (at_queries < rows), at_queries, rows)
    empty = target.new_full((batch, rows + 1), count, dtype=torch.int32)  # of int64 Inductor has no kernel on CUDA
    return empty.scatter(1, target, number.int()).narrow(1, 0, rows).long()


def reference(given: Arguments) -> Parts:
    """The op. The weights ``[B, H, Q, L]`` are kept, in float32 at least, and read at the salient rows and columns.

    That is one product over all keys where a fused attention has two. Arguments and results as for ``delta_attention``.
    """
    query, key, value, change, at_keys, at_queries, context, mask, scale = given
    batch, heads, rows, width = query.shape
    groups, keys, out, count = key.shape[1], key.shape[2], value.shape[3], change.shape[1]
    share = heads // groups  # query heads beside one another that read the same keys
    dtype = torch.promote_types(query.dtype, torch.float32)
    bias, spread = (None, None) if mask is None else _bias(mask, dtype, (batch, heads, rows, keys))
    weights = _weights(query.to(dtype) * (width**-0.5 if scale is None else scale), key.to(dtype), spread)

    there = (at_keys >= 0) & (at_keys < keys)
    columns = torch.where(there, at_keys, 0)[:, None, None, None].expand(-1, groups, share, rows, -1)
    turned = torch.where(there[..., None, None], change, 0).to(dtype).transpose(1, 2)
    delta = torch.matmul(weights.gather(4, columns).flatten(2, 3), turned).view(batch, heads, rows, out)

    # one row more than there are: what ``slot`` names where a query is not salient
    picked = torch.nn.functional.pad(torch.where((at_queries >= 0) & (at_queries < rows), at_queries, 0), (0, 1))
    lines = picked[:, None, None, :, None].expand(-1, groups, share, -1, keys)
    exact = torch.matmul(weights.gather(3, lines).flatten(2, 3), value.to(dtype)).view(batch, heads, count + 1, out)
    slot = salient_slots(at_queries, rows)[:, None, :, None].expand(-1, heads, -1, out)

    old = context.to(dtype)
    salient = slot < count
    new = torch.where(salient, exact.gather(2, slot), old + delta)
    if bias is not None:
        emptied = bias.amax(-1, keepdim=True) == -torch.inf
        new = torch.where(emptied, torch.where(salient, 0, old), new)
    return new.to(context.dtype), cosine(_products(new, old))


def _bias(mask: torch.Tensor, dtype: torch.dtype, size: Shape) -> Parts:
    """The mask as a bias, 0 and -inf for a bool one: with four dimensions as small as they came, and expanded."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool:
        return mask.to(dtype), mask.to(dtype).expand(size)
    bias = torch.where(mask, 0.0, -torch.inf).to(dtype).contiguous()
    # Inductor keeps what is read by strides; else it makes numbers of the bools anew for every row
    return bias, bias.as_strided(size, bias.expand(size).stride())


def _weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys, ``[B, Hkv, H / Hkv, Q, L]``; NaN in a row whose keys are all masked."""
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    shape = batch, groups, heads // groups, rows, keys
    grouped = query.reshape(batch * groups, heads // groups * rows, width)
    scores = torch.bmm(grouped, key.reshape(batch * groups, keys, width).mT).view(shape)
    if bias is not None:
        scores += bias.view(shape)
    return torch.softmax(scores, -1, out=scores)  # a second tensor of this size costs as much as the product


@operation("delta_attention", delta_attention)
def _delta_attention(*arguments: Any) -> Parts:
    """``reference`` in Inductor's hands on a CPU and in float64, a Triton kernel on CUDA."""
    given = Arguments(*arguments)
    if not on_cuda(given.query) or given.query.dtype == torch.float64:
        return reference(given)
    from dllm_compile.kernels.delta_attention_triton import launch

    return launch(given)


@register_flop_formula(torch.ops.dllm.delta_attention)
def _flops(query: Shape, key: Shape, value: Shape, change: Shape, *_: object, **more: object) -> int:
    """FLOPs of a call by the shapes of its arguments, two a multiply-add."""
    batch, heads, rows, width = query
    return 2 * batch * heads * (width * rows * key[2] + value[3] * change[1] * (rows + key[2]))
