"""``dllm::delta_attention`` on a GPU.

    part    one program for each tile of rows, key head, sequence and split of the keys
    merge   one program for each tile of rows, key head and sequence, if there are splits

A program is for as many rows as fill a tile; query heads that share a key head are rows of one tile, which reads that
head once: row ``r`` is query ``order[r // G]`` of head ``r % G`` in a group of ``G``. The salient queries come first in
``order``, so that most tiles hold no salient query, and multiply no weights with values. A tile or two of queries would
leave most multiprocessors idle: the keys are split, too (Flash-Decoding, 2023).

    all keys of a split    scores -> m, l = online softmax (arXiv 1805.02867); in a tile with a salient query P V beside
    then, with m, l of all splits:
    salient keys           exp(scores - m) -> the correction; not in a tile of nothing but salient queries
    at last                exact or corrected contexts, and each head's part of the products that the cosine is made of
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from dllm_compile.kernels.delta_attention import Arguments, Parts, cosine, salient_slots
from dllm_compile.kernels.operation import expected
from dllm_compile.kernels.sparse_attention_triton import splits_of


@triton.jit
def scores_of(
    q: tl.tensor,  # [ROWS, WIDTH]
    key: tl.tensor,  # of one sequence and head
    mask: tl.tensor,  # [ROWS] where the mask of each row begins, or None
    held: tl.tensor,  # [ROWS] bool
    column: tl.tensor,  # [KEYS] keys
    there: tl.tensor,
    scale: tl.tensor,
    width: tl.tensor,
    key_step: tl.tensor,
    key_stride: tl.tensor,
    mask_step: tl.tensor,
    BOOL: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Scores ``[ROWS, KEYS]`` in float32; -inf for a key that is not there."""
    at = tl.arange(0, WIDTH)
    k = tl.load(
        key + column[None, :] * key_step + at[:, None] * key_stride,
        mask=there[None, :] & (at[:, None] < width),
        other=0.0,
    )
    s = tl.dot(q, k, input_precision="ieee") * tl.cast(scale, tl.float32)  # Inductor gives a Python float as fp64
    if mask is not None:
        seen = held[:, None] & there[None, :]
        where = mask[:, None] + column[None, :] * mask_step
        if BOOL:
            s = tl.where(tl.load(where, mask=seen, other=0) != 0, s, -float("inf"))
        else:
            s += tl.load(where, mask=seen, other=0.0).to(tl.float32)
    return tl.where(there[None, :], s, -float("inf"))


@triton.jit
def delta_attention_kernel(
    query: tl.tensor,  # [B, H, Q, width]; like all but the next nine of the given strides
    key: tl.tensor,  # [B, H / GROUP, keys, width]
    value: tl.tensor,  # [B, H / GROUP, keys, out]
    change: tl.tensor,  # [B, turned, H / GROUP, out]
    context: tl.tensor,  # [B, H, Q, out]
    mask: tl.tensor,  # [B, H, Q, keys], or None
    at_keys: tl.tensor,  # [B, turned] int64, contiguous like all that follow
    order: tl.tensor,  # [B, Q] int32 queries, the salient ones first
    counts: tl.tensor,  # [B] int64, how many are salient
    new: tl.tensor,  # [B, Q, H, out]
    sums: tl.tensor,  # [3, B, H, Q] float32
    acc: tl.tensor,  # [splits, B, Q, H, out] float32, rows by their place in ``order``; or None without splits
    parts: tl.tensor,  # [2, splits, B, Q, H] float32: m, l; or None
    scale: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    turned: tl.tensor,
    per_split: tl.tensor,  # keys, a multiple of KEYS
    splits: tl.tensor,
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PASS: tl.constexpr,  # 0: all of it, 1: one split, 2: what follows the splits
    BOOL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TURNED: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
) -> None:
    """Contexts and products of one tile of rows. No number in ``at_keys`` makes it read outside of the tensors."""
    tiles = tl.cdiv(rows * GROUP, ROWS)
    tile = tl.program_id(0) % tiles
    key_of = (tl.program_id(0) // tiles % (HEADS // GROUP)).to(tl.int64)
    batch = (tl.program_id(0) // tiles // (HEADS // GROUP)).to(tl.int64)
    line = tile * ROWS + tl.arange(0, ROWS)
    place = line // GROUP
    head = key_of * GROUP + line % GROUP
    held = place < rows
    row = tl.load(order + batch * rows + place, mask=held, other=0).to(tl.int64)
    count = tl.load(counts + batch)
    some = tile * ROWS // GROUP < count  # a row is salient
    key += batch * key_batch + key_of * key_head
    value += batch * value_batch + key_of * value_head
    change += batch * change_batch + key_of * change_head
    mask_at = mask
    if mask is not None:
        mask_at = mask + batch * mask_batch + head * mask_head + row * mask_row

    at = tl.arange(0, WIDTH)
    to = tl.arange(0, OUT)
    inside = held[:, None] & (to[None, :] < out)
    q = tl.load(
        query + batch * query_batch + (head * query_head + row * query_step)[:, None] + at[None, :] * query_stride,
        mask=held[:, None] & (at[None, :] < width),
        other=0.0,
    )

    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    exact = tl.zeros([ROWS, OUT], tl.float32)
    split_line = (batch * rows + place) * HEADS + head
    lines = tl.num_programs(0).to(tl.int64) // tiles * GROUP * rows  # of a split
    if PASS < 2:
        begin = tl.program_id(1) * per_split
        end = tl.minimum(begin + per_split, keys)
        for start in range(begin, end, KEYS):
            column = start + tl.arange(0, KEYS).to(tl.int64)
            there = column < end
            s = scores_of(
                q, key, mask_at, held, column, there, scale, width, key_step, key_stride, mask_step, BOOL, WIDTH
            )
            larger = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(larger == -float("inf"), 0.0, larger)
            p = tl.exp(s - shift[:, None])
            fade = tl.exp(m - shift)
            total = total * fade + tl.sum(p, 1)
            if some:
                v = tl.load(
                    value + column[:, None] * value_step + to[None, :] * value_stride,
                    mask=there[:, None] & (to[None, :] < out),
                    other=0.0,
                )
                exact = tl.dot(p.to(v.dtype), v, exact * fade[:, None], input_precision="ieee")
            m = larger
    if PASS == 1:
        split_line += tl.program_id(1) * lines
        tl.store(parts + split_line, m, mask=held)
        tl.store(parts + splits * lines + split_line, total, mask=held)
        if some:
            tl.store(acc + split_line[:, None] * out + to[None, :], exact, mask=inside)
    if PASS == 2:
        for split in range(0, splits):
            here = split * lines + split_line
            m_part = tl.load(parts + here, mask=held, other=-float("inf"))
            larger = tl.maximum(m, m_part)
            shift = tl.where(larger == -float("inf"), 0.0, larger)
            fade, weight = tl.exp(m - shift), tl.exp(m_part - shift)
            total = total * fade + weight * tl.load(parts + splits * lines + here, mask=held, other=0.0)
            if some:
                part_at = acc + here[:, None] * out + to[None, :]
                exact = exact * fade[:, None] + weight[:, None] * tl.load(part_at, mask=inside, other=0.0)
            m = larger
    if PASS != 1:
        shift = tl.where(m == -float("inf"), 0.0, m)
        delta = tl.zeros([ROWS, OUT], tl.float32)
        if (tile * ROWS + ROWS - 1) // GROUP >= count:
            for start in range(0, turned, TURNED):
                slot = start + tl.arange(0, TURNED).to(tl.int64)
                column = tl.load(at_keys + batch * turned + slot, mask=slot < turned, other=-1)
                there = (column >= 0) & (column < keys)
                column = tl.where(there, column, 0)
                s = scores_of(
                    q, key, mask_at, held, column, there, scale, width, key_step, key_stride, mask_step, BOOL, WIDTH
                )
                d = tl.load(
                    change + slot[:, None] * change_step + to[None, :] * change_stride,
                    mask=there[:, None] & (to[None, :] < out),
                    other=0.0,
                )
                delta = tl.dot(tl.exp(s - shift[:, None]).to(d.dtype), d, delta, input_precision="ieee")

        context += batch * context_batch
        old_at = context + (head * context_head + row * context_step)[:, None] + to[None, :] * context_stride
        old = tl.load(old_at, mask=inside, other=0.0).to(tl.float32)
        part = tl.where((total == 0)[:, None], 0.0, 1.0 / total[:, None])  # no key may be seen: no weights
        result = tl.where((place < count)[:, None], exact * part, old + delta * part)

        tl.store(new + ((batch * rows + row) * HEADS + head)[:, None] * out + to[None, :], result, mask=inside)
        sums += (batch * HEADS + head) * rows + row
        tl.store(sums, tl.sum(result * old, 1), mask=held)
        tl.store(sums + lines, tl.sum(result * result, 1), mask=held)
        tl.store(sums + 2 * lines, tl.sum(old * old, 1), mask=held)


def tile_of(width: int, out: int, size: int, lines: int) -> dict[str, int]:
    """Constants and launch options for heads of ``width`` and ``out`` elements of ``size`` bytes.

    A key and a value tile are held twice, for the loop that loads ahead: 128 KiB at most for heads up to 256. A tile
    has no more rows than there are ``lines``: queries times the heads that share a key head.
    """
    wide, broad = (max(16, triton.next_power_of_2(n)) for n in (width, out))
    held = max(wide, broad) * size
    keys = 64 if held <= 256 else 32 if held <= 512 else 16
    rows = min(64 if max(wide, broad) <= 128 else 32, max(16, triton.next_power_of_2(lines)))
    sizes = {"ROWS": rows, "KEYS": keys, "TURNED": min(keys, 32), "WIDTH": wide, "OUT": broad}
    return sizes | {"num_warps": 4, "num_stages": 2}


def ordered(at_queries: torch.Tensor, rows: int, turned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries ``[B, rows]`` int32, the salient ones first, and how many these are, ``[B]`` int64.

    What is scattered is int32: for int64 Inductor has no kernel on CUDA, as it has no atomic sum of them.
    """
    salient = salient_slots(at_queries, rows) < turned
    count, rank = salient.sum(1), salient.cumsum(1)
    number = torch.ones_like(rank).cumsum(1) - 1
    place = torch.where(salient, rank - 1, count.unsqueeze(1) + number - rank)
    return torch.empty_like(place, dtype=torch.int32).scatter(1, place, number.int()), count


def launch(given: Arguments) -> Parts:
    """``dllm::delta_attention`` by the kernel above, for all but float64. Nothing is copied.

    One code serves any number of rows, keys and salient rows: its tile and its number of splits are good for those that
    it was compiled for.
    """
    query, key, value, change, at_keys, at_queries, context, mask, scale = given
    batch, heads, rows, width = query.shape
    groups, keys, out, turned = key.shape[1], key.shape[2], value.shape[3], change.shape[1]
    new = query.new_empty(batch, rows, heads, out).transpose(1, 2)  # the layout that the next projection reads
    sums = query.new_empty((3, batch, heads, rows), dtype=torch.float32)
    if not new.numel():
        return new, cosine(sums.sum(2))
    order, count = ordered(at_queries, rows, turned)
    spread = None if mask is None else mask.expand(batch, heads, rows, keys)
    group = heads // groups
    tile = tile_of(width, out, query.element_size(), expected(rows) * group)
    programs = batch * groups * triton.cdiv(rows * group, tile["ROWS"])
    splits = splits_of(expected(programs), expected(keys), tile["KEYS"])
    per_split = triton.cdiv(keys, splits * tile["KEYS"]) * tile["KEYS"]
    acc = parts = None
    if splits > 1:
        acc = query.new_empty((splits, batch, rows, heads, out), dtype=torch.float32)
        parts = query.new_empty((2, splits, batch, rows, heads), dtype=torch.float32)
    strides = [x.stride() for x in (query, key, value, change, context)]
    strides.append((0, 0, 0, 0) if spread is None else spread.stride())
    arguments: list[Any] = [query, key, value, change, context, spread, at_keys.contiguous(), order, count]
    arguments += [new, sums, acc, parts, width**-0.5 if scale is None else scale]
    arguments += [rows, keys, turned, per_split, splits, width, out, *(n for stride in strides for n in stride)]
    passes = ((1, splits), (2, 1)) if splits > 1 else ((0, 1),)
    for which, many in passes:
        wrap_triton(delta_attention_kernel)[(programs, many)](
            *arguments,
            HEADS=heads,
            GROUP=group,
            PASS=which,
            BOOL=mask is not None and mask.dtype == torch.bool,
            **tile,
        )
    return new, cosine(sums.sum(2))
