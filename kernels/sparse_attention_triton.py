"""``dllm::sparse_attention`` on a GPU.

    part    one program for each tile of rows, key head, sequence and split of the entries:  acc, m, l of the split
    merge   one program for each row, if there are splits:  out = sum exp(m_i - m) acc_i / sum exp(m_i - m) l_i

A block's queries are a tile or two, and heads alone would leave most multiprocessors idle: the entries are split, too
(Flash-Decoding, 2023; FlashDecoding++, arXiv 2311.01282). Query heads that share a key head are rows of one tile, which
reads that head once: row ``r`` is query ``r // G`` of head ``r % G`` in a group of ``G``. Within a split, the softmax
is online (arXiv 1805.02867). Sums are float32; float32 inputs are multiplied as they are, without tensor cores.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from dllm_compile.kernels.operation import expected
from dllm_compile.kernels.sparse_attention import Arguments

PROGRAMS = 264  # to have at work: two for each multiprocessor of an H200
SPLITS = 64


class Tile(NamedTuple):
    """Rows and entries that a program holds at once, and how it is compiled."""

    rows: int
    entries: int
    warps: int
    stages: int


# by the larger head size, a power of two, and the bytes of an element: all fit in the 99 KiB of shared memory that any
# GPU since sm_80 has
TILES = {
    (16, 2): Tile(64, 64, 4, 3),
    (32, 2): Tile(64, 64, 4, 3),
    (64, 2): Tile(64, 64, 4, 3),
    (128, 2): Tile(64, 64, 4, 2),
    (256, 2): Tile(32, 32, 4, 2),
    (16, 4): Tile(32, 64, 4, 2),
    (32, 4): Tile(32, 64, 4, 2),
    (64, 4): Tile(32, 32, 4, 2),
    (128, 4): Tile(32, 32, 4, 2),
    (256, 4): Tile(16, 16, 4, 2),
}


@triton.jit
def part_kernel(
    query: tl.tensor,  # [B, H, Q, HEAD] of the given strides, like all inputs
    key: tl.tensor,  # [B, H / GROUP, E, HEAD]
    value: tl.tensor,  # [B, H / GROUP, E, WIDTH]
    positions: tl.tensor,  # [B, E] int64, or None
    mask: tl.tensor,  # [B, H, Q, S] bool or floating, stride 0 where it is one for all; or None
    out: tl.tensor,  # [B, Q, H, WIDTH], or with splits acc, [splits, B, Q, H, WIDTH] float32
    sums: tl.tensor,  # with splits [2, splits, B, Q, H] float32: m, l
    queries: tl.tensor,
    entries: tl.tensor,
    tokens: tl.tensor,
    per_split: tl.tensor,  # entries, a multiple of N
    scale: tl.tensor,
    query_b: tl.tensor,
    query_h: tl.tensor,
    query_q: tl.tensor,
    query_d: tl.tensor,
    key_b: tl.tensor,
    key_h: tl.tensor,
    key_e: tl.tensor,
    key_d: tl.tensor,
    value_b: tl.tensor,
    value_h: tl.tensor,
    value_e: tl.tensor,
    value_d: tl.tensor,
    position_b: tl.tensor,
    position_e: tl.tensor,
    mask_b: tl.tensor,
    mask_h: tl.tensor,
    mask_q: tl.tensor,
    mask_s: tl.tensor,
    heads: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,  # whether there are splits to merge
    MASK_ROWS: tl.constexpr,  # whether the mask differs between rows of a tile
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,  # HEAD and WIDTH, padded
    V: tl.constexpr,
) -> None:
    """One split of one tile of rows. Memory past an end is never read: there, a row or column of a tile is 0."""
    tiles = tl.cdiv(queries * GROUP, M)
    kv_head = tl.program_id(0) // tiles % (heads // GROUP)
    b = (tl.program_id(0) // tiles // (heads // GROUP)).to(tl.int64)
    split = tl.program_id(1)

    row = tl.program_id(0) % tiles * M + tl.arange(0, M)
    q = (row // GROUP).to(tl.int64)
    h = kv_head * GROUP + row % GROUP
    there = q < queries
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    n = tl.arange(0, N)

    at = query + b * query_b + q * query_q + h.to(tl.int64) * query_h
    x = tl.load(at[:, None] + d[None, :] * query_d, mask=there[:, None] & (d < HEAD)[None, :], other=0.0)

    begin = split * per_split
    end = tl.minimum(begin + per_split, entries)
    key += b * key_b + kv_head.to(tl.int64) * key_h
    value += b * value_b + kv_head.to(tl.int64) * value_h
    if mask is not None:
        mask += b * mask_b
        mask_at = mask + h.to(tl.int64) * mask_h + q * mask_q

    m = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, V], tl.float32)
    for start in range(begin, end, N):
        e = start + n
        e_at = e.to(tl.int64)
        seen = e < end
        k = tl.load(
            key + e_at[None, :] * key_e + d[:, None] * key_d,
            mask=seen[None, :] & (d < HEAD)[:, None],
            other=0.0,
        )
        values = tl.load(
            value + e_at[:, None] * value_e + v[None, :] * value_d,
            mask=seen[:, None] & (v < WIDTH)[None, :],
            other=0.0,
        )
        position = e_at
        if positions is not None:
            position = tl.load(positions + b * position_b + e_at * position_e, mask=seen, other=tokens)
            seen = seen & (position >= 0) & (position < tokens)

        s = tl.dot(x, k, input_precision="ieee") * tl.cast(scale, tl.float32)
        s = tl.where(seen[None, :], s, -float("inf"))
        if mask is not None:
            if MASK_ROWS:
                allowed = there[:, None] & seen[None, :]
                column = tl.load(mask_at[:, None] + position[None, :] * mask_s, mask=allowed, other=0)
            else:
                column = tl.load(mask + position * mask_s, mask=seen, other=0)[None, :]
            s = tl.where(column, s, -float("inf")) if mask.dtype.element_ty == tl.int1 else s + column.to(tl.float32)

        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp(s - shift[:, None])
        alpha = tl.exp(m - shift)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        m = m_new

    line = (b * queries + q) * heads + h
    lines = tl.num_programs(0).to(tl.int64) // tiles * GROUP * queries
    if SPLIT:
        line += split * lines
        tl.store(sums + line, m, mask=there)
        tl.store(sums + tl.num_programs(1) * lines + line, total, mask=there)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_at = out + line[:, None] * WIDTH + v[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=there[:, None] & (v < WIDTH)[None, :])


@triton.jit
def merge_kernel(
    acc: tl.tensor,  # [splits, B, Q, H, WIDTH] float32
    sums: tl.tensor,  # [2, splits, B, Q, H] float32
    out: tl.tensor,  # [B, Q, H, WIDTH]
    splits: tl.tensor,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,  # padded, like V
    V: tl.constexpr,
) -> None:
    """Output of one row. Nothing was seen where every ``l`` is 0."""
    line = tl.program_id(0).to(tl.int64)
    lines = tl.num_programs(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    v = tl.arange(0, V)
    there = split < splits
    m = tl.load(sums + split * lines + line, mask=there, other=-float("inf"))
    total = tl.load(sums + (splits + split) * lines + line, mask=there, other=0.0)
    part = tl.load(
        acc + (split * lines + line)[:, None] * WIDTH + v[None, :],
        mask=there[:, None] & (v < WIDTH)[None, :],
        other=0.0,
    )
    most = tl.max(m, 0)
    weight = tl.exp(m - tl.where(most == -float("inf"), 0.0, most))
    total = tl.sum(weight * total, 0)
    result = tl.sum(weight[:, None] * part, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + line * WIDTH + v, result.to(out.dtype.element_ty), mask=v < WIDTH)


def tile_of(head: int, width: int, rows: int, itemsize: int) -> tuple[Tile, int, int]:
    """The tile for ``rows`` rows of one key head, and the two head sizes as powers of two, at least 16."""
    d, v = (max(16, triton.next_power_of_2(n)) for n in (head, width))
    tile = TILES[max(d, v), itemsize]
    return tile._replace(rows=min(tile.rows, max(16, triton.next_power_of_2(rows)))), d, v


def splits_of(programs: int, keys: int, tile: int) -> int:
    """Splits of the keys for ``programs`` tiles of rows, none of them empty; ``tile``: keys of a tile."""
    tiles = -(-keys // tile)
    splits = max(1, min(tiles, SPLITS, PROGRAMS // programs))  # one more, and what they hand on costs more
    return -(-tiles // -(-tiles // splits))


def launch(given: Arguments) -> torch.Tensor:
    """``dllm::sparse_attention`` by the kernels above, for head sizes to 256 and all dtypes but float64.

    Nothing is copied. The memory of the result is ``[B, Q, H, h_v]``, as the next projection reads it. One code serves
    any number of rows and of entries: its tile and its number of splits are good for those that it was compiled for.
    """
    query, value = given.query, given.value
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[3]))
    if not out.numel() or not value.shape[2]:
        return out.zero_().transpose(1, 2)
    tile, d, v, splits = _shape_of(given)
    acc, sums = out, None
    if splits > 1:
        acc, sums = _sums(query, splits, value.shape[3])
    _parts(given, tile, (d, v), splits, acc, sums)
    if splits > 1:
        wrap_triton(merge_kernel)[(batch * queries * heads,)](
            acc, sums, out, splits, WIDTH=value.shape[3], SPLITS=triton.next_power_of_2(splits), V=v, num_warps=4
        )
    return out.transpose(1, 2)


def launch_part(given: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """``dllm::attention_part`` by the first kernel above; Inductor fuses the sum over the splits with what follows.

    Returns:
        Contexts ``[B, H, Q, h_v]`` and log-sum-exps ``[B, H, Q]``, float32.
    """
    query, value = given.query, given.value
    batch, heads, queries, _ = query.shape
    if not query.numel() or not value.numel():
        context = query.new_zeros((batch, queries, heads, value.shape[3]), dtype=torch.float32)
        total = context.new_full(context.shape[:3], -torch.inf)
        return context.transpose(1, 2), total.transpose(1, 2)
    tile, d, v, splits = _shape_of(given)
    acc, sums = _sums(query, splits, value.shape[3])
    _parts(given, tile, (d, v), splits, acc, sums)
    most, shares = sums.unbind(0)
    shift = most.amax(0)
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    weights = (most - shift).exp()
    total = (weights * shares).sum(0)
    context = (weights.unsqueeze(4) * acc).sum(0) / total.masked_fill(total == 0, 1.0).unsqueeze(3)
    return context.transpose(1, 2), (shift + total.log()).transpose(1, 2)


def _shape_of(given: Arguments) -> tuple[Tile, int, int, int]:
    """The tile, the head sizes as powers of two, and the number of splits of the entries."""
    query, value = given.query, given.value
    batch, heads, queries, head = query.shape
    kv_heads, entries, width = value.shape[1:]
    group = heads // kv_heads
    tile, d, v = tile_of(head, width, expected(queries) * group, query.dtype.itemsize)
    programs = batch * kv_heads * triton.cdiv(queries * group, tile.rows)
    return tile, d, v, splits_of(expected(programs), expected(entries), tile.entries)


def _sums(query: torch.Tensor, splits: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for what the splits hand on: ``[splits, B, Q, H, h_v]``, and ``[2, splits, B, Q, H]``."""
    batch, heads, queries, _ = query.shape
    acc = query.new_empty((splits, batch, queries, heads, width), dtype=torch.float32)
    return acc, query.new_empty((2, splits, batch, queries, heads), dtype=torch.float32)


def _parts(
    given: Arguments, tile: Tile, sizes: tuple[int, int], splits: int, acc: torch.Tensor, sums: torch.Tensor | None
) -> None:
    """Run the first kernel; without ``sums`` there is one split, and ``acc`` is the result ``[B, Q, H, h_v]``."""
    query, key, value, positions, tokens, mask, scale = given
    batch, heads, queries, head = query.shape
    kv_heads, entries, width = value.shape[1:]
    group = heads // kv_heads
    programs = batch * kv_heads * triton.cdiv(queries * group, tile.rows)
    per_split = triton.cdiv(entries, splits * tile.entries) * tile.entries
    full = None if mask is None else mask.expand(batch, heads, queries, tokens)
    strides = [*query.stride(), *key.stride(), *value.stride()]
    strides += [0, 0] if positions is None else positions.stride()
    strides += [0, 0, 0, 0] if full is None else full.stride()
    wrap_triton(part_kernel)[(programs, splits)](
        *(query, key, value, positions, full, acc, sums, queries, entries, tokens, per_split),
        head**-0.5 if scale is None else scale,
        *strides,
        heads=heads,
        GROUP=group,
        HEAD=head,
        WIDTH=width,
        SPLIT=sums is not None,
        MASK_ROWS=mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1),
        M=tile.rows,
        N=tile.entries,
        D=sizes[0],
        V=sizes[1],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
