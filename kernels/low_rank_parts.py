"""Low-rank updates of any rank: factors are taken apart into bfloat16 once, then multiplied as such."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels.bits import apart, dot_of_parts, to_bfloat16
from rocr_kernels.low_rank_tiles import rounded_tile, weight_tile


@triton.jit
def split_factors(
    table,
    parts,
    size,
    rank,
    part_rank,
    stride,
    rank_stride,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write each layer's factor, one row for each row or column of the weight, as (size, PARTS * part_rank)."""
    layer = tl.program_id(2).to(tl.int64)
    # 64 bits: a factor may have more than 2**31 numbers.
    index = (tl.program_id(0) * SIZE + tl.arange(0, SIZE)).to(tl.int64)[:, None]
    ranks = (tl.program_id(1) * RANK + tl.arange(0, RANK)).to(tl.int64)[None, :]
    factor = tl.load(table + layer).to(tl.pointer_type(tl.float32))
    value = tl.load(factor + (index * stride + ranks * rank_stride), mask=(index < size) & (ranks < rank), other=0.0)
    target = parts + (layer * size + index) * (PARTS * part_rank) + ranks
    for part in tl.static_range(PARTS):
        rounded = to_bfloat16(value, INTERPRETED)
        value -= rounded.to(tl.float32)
        tl.store(target + part * part_rank, rounded, mask=(index < size) & (ranks < part_rank))


@triton.jit
def _parts_tiles(
    factor,
    first,
    last,
    rank,
    part_rank,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Tiles (SIZE, RANK) of the high, middle and low part of a factor, 0 from row last on; two parts: no low one."""
    index = tl.arange(0, SIZE)[:, None]
    inside = index < last - first
    stride = PARTS * part_rank
    offsets = index * tl.cast(stride, OFFSETS) + tl.arange(0, RANK)[None, :]
    high = factor + tl.cast(first, tl.int64) * stride + rank + offsets
    middle = high + part_rank
    high_tile = tl.load(high, mask=inside, other=0.0)
    middle_tile = tl.load(middle, mask=inside, other=0.0)
    if PARTS == 3:
        return high_tile, middle_tile, tl.load(middle + part_rank, mask=inside, other=0.0)
    else:
        return high_tile, middle_tile, middle_tile


@triton.jit
def add_low_rank_parts(
    table,
    lefts,
    rights,
    layers,
    rows,
    columns,
    part_rank,
    weight_stride,
    scale,
    seed,
    items,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STAGES: tl.constexpr,
    OFFSETS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Persistent kernel: an item is a tile of a layer; lefts and rights are what split_factors wrote."""
    tile_columns = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * tile_columns
    stride = PARTS * part_rank
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        layer = item // tiles
        row = item % tiles // tile_columns * ROWS
        column = item % tile_columns * COLUMNS
        weight = tl.load(table + layer).to(tl.pointer_type(TYPE))
        number = tl.load(table + 3 * layers + layer).to(tl.int32)
        weight_row_stride = weight_stride
        width = columns
        if ALIGNED:
            # They are multiples already; said so, the compiler moves 16 bytes at once.
            weight = tl.multiple_of(weight, 16)
            weight_row_stride = weight_row_stride // 8 * 8
            width = width // 8 * 8
        left = lefts + layer.to(tl.int64) * rows * stride
        right = rights + layer.to(tl.int64) * columns * stride
        pointers, mask = weight_tile(weight, row, column, rows, width, weight_row_stride, ROWS, COLUMNS, OFFSETS)
        old = tl.load(pointers, mask=mask, other=0.0)
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in tl.range(0, part_rank, RANK, num_stages=STAGES):
            left_high, left_middle, left_low = _parts_tiles(
                left, row, rows, step, part_rank, PARTS, ROWS, RANK, OFFSETS
            )
            high, middle, low = _parts_tiles(right, column, columns, step, part_rank, PARTS, COLUMNS, RANK, OFFSETS)
            start = tl.zeros((ROWS, COLUMNS), dtype=tl.float32) if PARTS == 3 else product
            of_step = dot_of_parts(left_high, left_middle, left_low, high.T, middle.T, low.T, start, PARTS, INTERPRETED)
            # A float32 weight keeps what tensor cores would lose of their sums over a long rank.
            product = product + apart(of_step, INTERPRETED) if PARTS == 3 else of_step
        exact = old.to(tl.float32) + scale * product
        new = rounded_tile(exact, row, column, columns, seed, number, TYPE, AT_RANDOM, INTERPRETED)
        tl.store(pointers, new, mask=mask)
