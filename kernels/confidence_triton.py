"""``dllm::confidence`` on a GPU, in one read of the logits.

    part    one program for each row and tile of columns:  logits -> m, first, second, Z, S of the tile
    merge   one program for each row:                      the tiles of a row -> the five outputs

Rows alone would not fill a GPU: a block of LLaDA is 32 rows, an H200 has 132 multiprocessors; the tiles are 992. A tile
is held in registers, so its maximum is known before its sums begin, and only the merge rescales (online softmax, arXiv
1805.02867).
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from dllm_compile.kernels.confidence import Parts

TILE = 4096


@triton.jit
def part_kernel(
    logits: tl.tensor,  # [outer, inner, columns] of the given strides
    sums: tl.tensor,  # [4, rows, tiles]: m, second, Z, S
    first: tl.tensor,  # [rows, tiles] int32
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    column_stride: tl.tensor,
    columns: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Sums of one tile. Columns that are not there are -inf, which is never first among equals."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start = logits + row // inner * outer_stride + row % inner * inner_stride
    x = tl.load(start + column.to(tl.int64) * column_stride, mask=column < columns, other=-float("inf"))
    x = x.to(sums.dtype.element_ty)

    is_nan = x != x
    m = tl.max(tl.where(is_nan, -float("inf"), x), 0)
    best = tl.min(tl.where(x == m, column, columns), 0)
    second = tl.max(tl.where((column == best) | is_nan, -float("inf"), x), 0)
    m = tl.where(tl.max(is_nan.to(tl.int32), 0) > 0, float("nan"), m)

    shifted = x - tl.where(m == -float("inf"), 0.0, m)
    shifted = tl.where(shifted < -1000.0, -1000.0, shifted)
    weight = tl.exp(shifted)

    here = row * tl.num_programs(1) + tl.program_id(1)
    step = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(sums + here, m)
    tl.store(sums + here + step, second)
    tl.store(sums + here + 2 * step, tl.sum(weight, 0))
    tl.store(sums + here + 3 * step, tl.sum(weight * shifted, 0))
    tl.store(first + here, best)


@triton.jit
def merge_kernel(
    logits: tl.tensor,  # as for part_kernel
    chosen: tl.tensor,  # [rows] int64, or None
    sums: tl.tensor,
    first: tl.tensor,
    best_out: tl.tensor,  # [rows] int64
    maximum_out: tl.tensor,  # [rows], like the next three
    probability_out: tl.tensor,
    entropy_out: tl.tensor,
    margin_out: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    column_stride: tl.tensor,
    columns: tl.tensor,
    tiles: tl.tensor,
    TILES: tl.constexpr,
) -> None:
    """Outputs of one row. A ``chosen`` that is no column has probability NaN: nothing is read outside of the row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    there = tile < tiles
    here = row * tiles + tile
    step = tl.num_programs(0).to(tl.int64) * tiles
    m = tl.load(sums + here, mask=there, other=-float("inf"))
    second = tl.load(sums + here + step, mask=there, other=-float("inf"))
    total = tl.load(sums + here + 2 * step, mask=there, other=0.0)
    moment = tl.load(sums + here + 3 * step, mask=there, other=0.0)
    at = tl.load(first + here, mask=there, other=columns)

    is_nan = m != m
    maximum = tl.max(tl.where(is_nan, -float("inf"), m), 0)
    best = tl.min(tl.where(m == maximum, at, columns), 0)
    second = tl.max(tl.where(at == best, second, m), 0)
    any_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    maximum = tl.where(any_nan, float("nan"), maximum)

    shift = m - maximum
    shift = tl.where(shift < -1000.0, -1000.0, shift)
    scale = tl.exp(shift)
    moment = tl.sum(scale * (moment + shift * total), 0)
    total = tl.sum(scale * total, 0)
    probability = 1 / total
    if chosen is not None:
        pick = tl.load(chosen + row)
        start = logits + row // inner * outer_stride + row % inner * inner_stride
        x = tl.load(start + pick * column_stride, mask=(pick >= 0) & (pick < columns), other=float("nan"))
        probability = tl.exp(x.to(maximum.dtype) - maximum) / total

    tl.store(best_out + row, tl.where(any_nan, 0, best).to(tl.int64))
    tl.store(maximum_out + row, maximum)
    tl.store(probability_out + row, probability)
    tl.store(entropy_out + row, moment / total - tl.log(total))
    tl.store(margin_out + row, (1 - tl.exp(second - maximum)) / total)


def tile_of(columns: int) -> tuple[int, int]:
    """Columns a program reads, and its warps: 16 columns a thread, so that three programs fit on a multiprocessor."""
    tile = min(TILE, triton.next_power_of_2(columns))
    return tile, max(tile // 512, 1)


def launch(logits: torch.Tensor, chosen: torch.Tensor | None) -> Parts:
    """``dllm::confidence`` by the kernels above. Only logits of four dimensions or more may have to be copied."""
    lead, columns = logits.shape[:-1], int(logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    best = logits.new_empty(lead, dtype=torch.int64)
    maximum, probability, entropy, margin = (logits.new_empty(lead, dtype=dtype) for _ in range(4))
    rows = best.numel()
    if rows:
        *outer, inner = (1, *lead)
        x = logits.reshape(math.prod(outer), inner, columns)
        layout = (inner, *x.stride(), columns)
        tile, warps = tile_of(columns)
        tiles = triton.cdiv(columns, tile)
        sums = logits.new_empty((4, rows, tiles), dtype=dtype)
        first = logits.new_empty((rows, tiles), dtype=torch.int32)
        wrap_triton(part_kernel)[(rows, tiles)](x, sums, first, *layout, TILE=tile, num_warps=warps)
        picks = None if chosen is None else chosen.reshape(-1)
        outputs = (best, maximum, probability, entropy, margin)
        wrap_triton(merge_kernel)[(rows,)](
            x, picks, sums, first, *outputs, *layout, tiles, TILES=triton.next_power_of_2(tiles), num_warps=1
        )
    return best, maximum, probability, entropy, margin
