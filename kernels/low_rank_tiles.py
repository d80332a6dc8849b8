"""What the kernels of low-rank updates share: tiles of weights and factors, their products, and rounding."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels._common import dot, random_bits, round_stochastic, to_bfloat16


@triton.jit
def dot_bf16_splits(
    left_high,
    left_middle,
    left_low,
    right_high,
    right_middle,
    right_low,
    accumulator,
    BF16_SPLITS: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Return accumulator + left @ right of two split operands: three or six products, the smallest first."""
    if BF16_SPLITS == 3:
        accumulator = dot(left_high, right_low, accumulator, BACKEND)
        accumulator = dot(left_low, right_high, accumulator, BACKEND)
        accumulator = dot(left_middle, right_middle, accumulator, BACKEND)
    accumulator = dot(left_high, right_middle, accumulator, BACKEND)
    accumulator = dot(left_middle, right_high, accumulator, BACKEND)
    return dot(left_high, right_high, accumulator, BACKEND)


@triton.jit
def factor_tile(
    factor, first, last, stride, rank, rank_stride, SIZE: tl.constexpr, RANK: tl.constexpr, OFFSETS: tl.constexpr
):
    """Load [SIZE, RANK] of a factor, one row for each row or column of the weight; 0 outside."""
    index = tl.cast(first + tl.arange(0, SIZE), OFFSETS)[:, None]
    ranks = tl.cast(tl.arange(0, RANK), OFFSETS)[None, :]
    return tl.load(factor + (index * stride + ranks * rank_stride), mask=(index < last) & (ranks < rank), other=0.0)


@triton.jit
def split_factor_tiles(
    factor,
    first,
    last,
    rank,
    term_rank,
    BF16_SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Load [SIZE, RANK] of the high, middle and low terms that split_factors wrote; 0 from row `last` on.

    With two splits, middle takes the place of low.
    """
    index = tl.arange(0, SIZE)[:, None]
    inside = index < last - first
    stride = BF16_SPLITS * term_rank
    offsets = index * tl.cast(stride, OFFSETS) + tl.arange(0, RANK)[None, :]
    high = factor + tl.cast(first, tl.int64) * stride + rank + offsets
    middle = high + term_rank
    high_tile = tl.load(high, mask=inside, other=0.0)
    middle_tile = tl.load(middle, mask=inside, other=0.0)
    if BF16_SPLITS == 3:
        return high_tile, middle_tile, tl.load(middle + term_rank, mask=inside, other=0.0)
    else:
        return high_tile, middle_tile, middle_tile


@triton.jit
def weight_tile(
    weight, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OFFSETS: tl.constexpr
):
    """Pointers to a tile of a weight, and the mask of its elements that exist."""
    tile_row = tl.arange(0, ROWS)[:, None]
    tile_column = tl.arange(0, COLUMNS)[None, :]
    # The first row needs 64 bits. The offsets from it have the type OFFSETS.
    first = weight + tl.cast(row, tl.int64) * stride + column
    pointers = first + (tile_row * tl.cast(stride, OFFSETS) + tile_column)
    return pointers, (tile_row < rows - row) & (tile_column < columns - column)


@triton.jit
def strip_of_item(item, whole, splits, split_rows, rows):
    """Column strip of an item, its first row and the end of its rows; ColumnStrips describes the items."""
    beyond = tl.maximum(item - whole, 0)
    first_row = beyond % splits * split_rows
    strip = tl.where(item < whole, item, whole + beyond // splits)
    return strip, first_row, tl.where(item < whole, rows, tl.minimum(first_row + split_rows, rows))


@triton.jit
def rounded_tile(
    exact,
    row,
    column,
    columns,
    seed,
    layer_index,
    TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Round a float32 tile to the weight's type, once."""
    ROWS: tl.constexpr = exact.shape[0]
    COLUMNS: tl.constexpr = exact.shape[1]
    if STOCHASTIC:
        eighths = column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
        first = (row + tl.arange(0, ROWS)[:, None]) * tl.cdiv(columns, 8) + eighths
        exact = round_stochastic(exact, random_bits(seed, first, layer_index, ROWS, COLUMNS), TYPE)
    if tl.bfloat16 == TYPE:
        return to_bfloat16(exact, BACKEND)
    else:
        return exact.to(TYPE)
