"""Low-rank updates of small rank: a program keeps its part of right and streams tiles of the weight past it."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels.bits import dot_of_parts, in_parts, random_bits, round_at_random, to_bfloat16


@triton.jit
def factor_tile(
    factor, first, last, stride, rank, rank_stride, SIZE: tl.constexpr, RANK: tl.constexpr, OFFSETS: tl.constexpr
):
    """Tile (SIZE, RANK) of a factor, one row for each row or column of the weight; 0 outside."""
    index = tl.cast(first + tl.arange(0, SIZE), OFFSETS)[:, None]
    ranks = tl.cast(tl.arange(0, RANK), OFFSETS)[None, :]
    return tl.load(factor + (index * stride + ranks * rank_stride), mask=(index < last) & (ranks < rank), other=0.0)


@triton.jit
def weight_tile(
    weight, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OFFSETS: tl.constexpr
):
    """Pointers to a tile of a weight, and a mask of what lies inside."""
    tile_row = tl.arange(0, ROWS)[:, None]
    tile_column = tl.arange(0, COLUMNS)[None, :]
    # The first row needs 64 bits; the others are as far from it as OFFSETS holds.
    first = weight + tl.cast(row, tl.int64) * stride + column
    pointers = first + (tile_row * tl.cast(stride, OFFSETS) + tile_column)
    return pointers, (tile_row < rows - row) & (tile_column < columns - column)


@triton.jit
def band_of_item(item, whole, splits, split_rows, rows):
    """Column of tiles of an item, its first row and where it ends; see schedule.Bands."""
    beyond = tl.maximum(item - whole, 0)
    first_row = beyond % splits * split_rows
    band = tl.where(item < whole, item, whole + beyond // splits)
    return band, first_row, tl.where(item < whole, rows, tl.minimum(first_row + split_rows, rows))


@triton.jit
def rounded_tile(
    exact,
    row,
    column,
    columns,
    seed,
    number,
    TYPE: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Round a tile of float32 to the weight's type, once."""
    ROWS: tl.constexpr = exact.shape[0]
    COLUMNS: tl.constexpr = exact.shape[1]
    if AT_RANDOM:
        eighths = column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
        first = (row + tl.arange(0, ROWS)[:, None]) * tl.cdiv(columns, 8) + eighths
        exact = round_at_random(exact, random_bits(seed, first, number, ROWS, COLUMNS), TYPE)
    if tl.bfloat16 == TYPE:
        return to_bfloat16(exact, INTERPRETED)
    else:
        return exact.to(TYPE)


@triton.jit
def add_low_rank(
    table,
    layers,
    rows,
    columns,
    rank,
    weight_stride,
    left_row_stride,
    left_rank_stride,
    right_rank_stride,
    right_column_stride,
    scale,
    seed,
    whole,
    splits,
    split_rows,
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
    """Persistent kernel: an item is a band of COLUMNS columns; for the table see low_rank_update._Layers."""
    tile_columns = tl.cdiv(columns, COLUMNS)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        band, first_row, last_row = band_of_item(item, whole, splits, split_rows, rows)
        layer = band // tile_columns
        column = band % tile_columns * COLUMNS
        weight = tl.load(table + layer).to(tl.pointer_type(TYPE))
        left = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
        right = tl.load(table + 2 * layers + layer).to(tl.pointer_type(tl.float32))
        number = tl.load(table + 3 * layers + layer).to(tl.int32)
        stride = weight_stride
        width = columns
        if ALIGNED:
            # They are multiples already; said so, the compiler moves 16 bytes at once.
            weight = tl.multiple_of(weight, 16)
            left = tl.multiple_of(left, 16)
            right = tl.multiple_of(right, 16)
            stride = stride // 8 * 8
            width = width // 8 * 8

        own_right = factor_tile(
            right, column, width, right_column_stride, rank, right_rank_stride, COLUMNS, RANK, OFFSETS
        )
        high, middle, low = in_parts(own_right, PARTS, INTERPRETED)
        for row in tl.range(first_row, last_row, ROWS, num_stages=STAGES):
            pointers, mask = weight_tile(weight, row, column, last_row, width, stride, ROWS, COLUMNS, OFFSETS)
            old = tl.load(pointers, mask=mask, other=0.0)
            own_left = factor_tile(left, row, last_row, left_row_stride, rank, left_rank_stride, ROWS, RANK, OFFSETS)
            left_high, left_middle, left_low = in_parts(own_left, PARTS, INTERPRETED)
            product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            product = dot_of_parts(
                left_high, left_middle, left_low, high.T, middle.T, low.T, product, PARTS, INTERPRETED
            )
            exact = old.to(tl.float32) + scale * product
            new = rounded_tile(exact, row, column, columns, seed, number, TYPE, AT_RANDOM, INTERPRETED)
            tl.store(pointers, new, mask=mask)
