"""``dllm::delta_attention`` on a GPU, in one pass over the keys and one over the salient ones.

One program for each sequence, head and tile of queries. The salient queries come first in ``order``, so that most tiles
hold no salient query, and multiply no weights with values:

    all keys        scores -> m, l = online softmax (arXiv 1805.02867); in a tile with a salient query P V beside them
    salient keys    exp(scores - m) -> the correction; not in a tile of nothing but salient queries
    at last         exact or corrected contexts, and each head's part of the products that the cosine is made of
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from dllm_compile.kernels.delta_attention import Arguments, Parts, cosine, salient_slots


@triton.jit
def scores_of(
    q: tl.tensor,  # [QUERIES, WIDTH]
    key: tl.tensor,  # of one sequence and head
    mask: tl.tensor,  # of one sequence and head, or None
    row: tl.tensor,  # [QUERIES] queries, for the mask
    row_there: tl.tensor,
    column: tl.tensor,  # [KEYS] keys
    there: tl.tensor,
    scale: tl.tensor,
    width: tl.tensor,
    key_step: tl.tensor,
    key_stride: tl.tensor,
    mask_row: tl.tensor,
    mask_step: tl.tensor,
    BOOL: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Scores ``[QUERIES, KEYS]`` in float32; -inf for a key that is not there."""
    at = tl.arange(0, WIDTH)
    k = tl.load(
        key + column[None, :] * key_step + at[:, None] * key_stride,
        mask=there[None, :] & (at[:, None] < width),
        other=0.0,
    )
    s = tl.dot(q, k, input_precision="ieee") * tl.cast(scale, tl.float32)  # Inductor gives a Python float as fp64
    if mask is not None:
        held = row_there[:, None] & there[None, :]
        where = mask + row[:, None] * mask_row + column[None, :] * mask_step
        if BOOL:
            s = tl.where(tl.load(where, mask=held, other=0) != 0, s, -float("inf"))
        else:
            s += tl.load(where, mask=held, other=0.0).to(tl.float32)
    return tl.where(there[None, :], s, -float("inf"))


@triton.jit
def delta_attention_kernel(
    query: tl.tensor,  # [B, H, Q, width]; like all but the next nine of the given strides
    key: tl.tensor,  # [B, H / share, keys, width]
    value: tl.tensor,  # [B, H / share, keys, out]
    change: tl.tensor,  # [B, turned, H / share, out]
    context: tl.tensor,  # [B, H, Q, out]
    mask: tl.tensor,  # [B, H, Q, keys], or None
    at_keys: tl.tensor,  # [B, turned] int64, contiguous like all that follow
    order: tl.tensor,  # [B, Q] int64 queries, the salient ones first
    counts: tl.tensor,  # [B] int64, how many are salient
    new: tl.tensor,  # [B, Q, H, out]
    sums: tl.tensor,  # [3, B, H, Q] float32
    scale: tl.tensor,
    share: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    turned: tl.tensor,
    width: tl.tensor,
    out: tl.tensor,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_step: tl.tensor,
    query_stride: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_step: tl.tensor,
    key_stride: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_step: tl.tensor,
    value_stride: tl.tensor,
    change_batch: tl.tensor,
    change_step: tl.tensor,
    change_head: tl.tensor,
    change_stride: tl.tensor,
    context_batch: tl.tensor,
    context_head: tl.tensor,
    context_step: tl.tensor,
    context_stride: tl.tensor,
    mask_batch: tl.tensor,
    mask_head: tl.tensor,
    mask_row: tl.tensor,
    mask_step: tl.tensor,
    BOOL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TURNED: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
) -> None:
    """Contexts and products of one tile of queries. No number in ``at_keys`` makes it read outside of the tensors."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * QUERIES
    place = first + tl.arange(0, QUERIES)
    held = place < rows
    row = tl.load(order + batch * rows + place, mask=held, other=0)
    count = tl.load(counts + batch)
    key += batch * key_batch + head // share * key_head
    value += batch * value_batch + head // share * value_head
    change += batch * change_batch + head // share * change_head
    if mask is not None:
        mask += batch * mask_batch + head * mask_head

    at = tl.arange(0, WIDTH)
    to = tl.arange(0, OUT)
    inside = held[:, None] & (to[None, :] < out)
    query += batch * query_batch + head * query_head
    q = tl.load(
        query + row[:, None] * query_step + at[None, :] * query_stride,
        mask=held[:, None] & (at[None, :] < width),
        other=0.0,
    )

    m = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    exact = tl.zeros([QUERIES, OUT], tl.float32)
    for start in range(0, keys, KEYS):
        column = start + tl.arange(0, KEYS).to(tl.int64)
        there = column < keys
        s = scores_of(
            q, key, mask, row, held, column, there, scale, width, key_step, key_stride, mask_row, mask_step, BOOL, WIDTH
        )
        larger = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        p = tl.exp(s - shift[:, None])
        fade = tl.exp(m - shift)
        total = total * fade + tl.sum(p, 1)
        if first < count:
            v = tl.load(
                value + column[:, None] * value_step + to[None, :] * value_stride,
                mask=there[:, None] & (to[None, :] < out),
                other=0.0,
            )
            exact = tl.dot(p.to(v.dtype), v, exact * fade[:, None], input_precision="ieee")
        m = larger

    shift = tl.where(m == -float("inf"), 0.0, m)
    delta = tl.zeros([QUERIES, OUT], tl.float32)
    if first + QUERIES > count:
        for start in range(0, turned, TURNED):
            slot = start + tl.arange(0, TURNED).to(tl.int64)
            column = tl.load(at_keys + batch * turned + slot, mask=slot < turned, other=-1)
            there = (column >= 0) & (column < keys)
            column = tl.where(there, column, 0)
            s = scores_of(
                q,
                key,
                mask,
                row,
                held,
                column,
                there,
                scale,
                width,
                key_step,
                key_stride,
                mask_row,
                mask_step,
                BOOL,
                WIDTH,
            )
            d = tl.load(
                change + slot[:, None] * change_step + to[None, :] * change_stride,
                mask=there[:, None] & (to[None, :] < out),
                other=0.0,
            )
            delta = tl.dot(tl.exp(s - shift[:, None]).to(d.dtype), d, delta, input_precision="ieee")

    context += batch * context_batch + head * context_head
    old = tl.load(context + row[:, None] * context_step + to[None, :] * context_stride, mask=inside, other=0.0).to(
        tl.float32
    )
    part = tl.where((total == 0)[:, None], 0.0, 1.0 / total[:, None])  # no key may be seen: no weights
    result = tl.where((place < count)[:, None], exact * part, old + delta * part)

    heads = tl.num_programs(1)
    tl.store(new + ((batch * rows + row[:, None]) * heads + head) * out + to[None, :], result, mask=inside)
    sums += (batch * heads + head) * rows + row
    step = tl.num_programs(2).to(tl.int64) * heads * rows
    tl.store(sums, tl.sum(result * old, 1), mask=held)
    tl.store(sums + step, tl.sum(result * result, 1), mask=held)
    tl.store(sums + 2 * step, tl.sum(old * old, 1), mask=held)


def tile_of(width: int, out: int, size: int) -> dict[str, int]:
    """Constants and launch options for heads of ``width`` and ``out`` elements of ``size`` bytes.

    A key and a value tile are held twice, for the loop that loads ahead: 128 KiB at most for heads up to 256.
    """
    wide, broad = (max(16, triton.next_power_of_2(n)) for n in (width, out))
    held = max(wide, broad) * size
    keys = 64 if held <= 256 else 32 if held <= 512 else 16
    queries = 64 if max(wide, broad) <= 128 else 32
    sizes = {"QUERIES": queries, "KEYS": keys, "TURNED": min(keys, 32), "WIDTH": wide, "OUT": broad}
    return sizes | {"num_warps": 4, "num_stages": 2}


def launch(given: Arguments) -> Parts:
    """``dllm::delta_attention`` by the kernel above, for all but float64. Nothing is copied."""
    query, key, value, change, at_keys, at_queries, context, mask, scale = given
    batch, heads, rows, width = query.shape
    keys, out, turned = key.shape[2], value.shape[3], change.shape[1]
    new = query.new_empty(batch, rows, heads, out).transpose(1, 2)  # the layout that the next projection reads
    sums = query.new_empty((3, batch, heads, rows), dtype=torch.float32)
    if new.numel():
        salient = salient_slots(at_queries, rows) < turned
        count, rank = salient.sum(1), salient.cumsum(1)
        number = torch.ones_like(rank).cumsum(1) - 1
        place = torch.where(salient, rank - 1, count.unsqueeze(1) + number - rank)
        order = torch.empty_like(place).scatter(1, place, number)
        spread = None if mask is None else mask.expand(batch, heads, rows, keys)
        tile = tile_of(width, out, query.element_size())
        sizes = (width**-0.5 if scale is None else scale, heads // key.shape[1], rows, keys, turned, width, out)
        strides = [x.stride() for x in (query, key, value, change, context)]
        strides.append((0, 0, 0, 0) if spread is None else spread.stride())
        wrap_triton(delta_attention_kernel)[(triton.cdiv(rows, tile["QUERIES"]), heads, batch)](
            *(query, key, value, change, context, spread, at_keys.contiguous(), order, count),
            *(new, sums, *sizes, *(n for stride in strides for n in stride)),
            BOOL=mask is not None and mask.dtype == torch.bool,
            **tile,
        )
    return new, cosine(sums.sum(2))
