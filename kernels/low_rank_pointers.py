"""The kernels of low-rank updates that move everything through pointers; low_rank_update.py describes them."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels._common import opaque, split_bf16, to_bfloat16
from rocr_kernels.low_rank_tiles import (
    dot_bf16_splits,
    factor_tile,
    rounded_tile,
    split_factor_tiles,
    strip_of_item,
    weight_tile,
)


@triton.jit
def add_low_rank_resident(
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
    STOCHASTIC: tl.constexpr,
    BF16_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STAGES: tl.constexpr,
    OFFSETS: tl.constexpr,
    BACKEND: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
):
    """Persistent kernel for ranks up to RANK. An item is a column strip; _Layers describes the table."""
    tile_columns = tl.cdiv(columns, COLUMNS)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        strip, first_row, last_row = strip_of_item(item, whole, splits, split_rows, rows)
        layer = strip // tile_columns
        column = strip % tile_columns * COLUMNS
        weight = tl.load(table + layer).to(tl.pointer_type(TYPE))
        left = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
        right = tl.load(table + 2 * layers + layer).to(tl.pointer_type(tl.float32))
        layer_index = tl.load(table + 3 * layers + layer).to(tl.int32)
        stride = weight_stride
        width = columns
        if ALIGNED:
            # The compiler does not know that these are multiples of 8; once it does, it moves 16 bytes at a time.
            weight = tl.multiple_of(weight, 16)
            left = tl.multiple_of(left, 16)
            right = tl.multiple_of(right, 16)
            stride = stride // 8 * 8
            width = width // 8 * 8

        own_right = factor_tile(
            right, column, width, right_column_stride, rank, right_rank_stride, COLUMNS, RANK, OFFSETS
        )  # [COLUMNS, RANK]
        high, middle, low = split_bf16(own_right, BF16_SPLITS, BACKEND)
        for row in tl.range(first_row, last_row, ROWS, num_stages=STAGES):
            pointers, mask = weight_tile(weight, row, column, last_row, width, stride, ROWS, COLUMNS, OFFSETS)
            old = tl.load(pointers, mask=mask, other=0.0)
            own_left = factor_tile(left, row, last_row, left_row_stride, rank, left_rank_stride, ROWS, RANK, OFFSETS)
            left_high, left_middle, left_low = split_bf16(own_left, BF16_SPLITS, BACKEND)
            product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            product = dot_bf16_splits(
                left_high, left_middle, left_low, high.T, middle.T, low.T, product, BF16_SPLITS, BACKEND
            )
            exact = old.to(tl.float32) + scale * product
            new = rounded_tile(exact, row, column, columns, seed, layer_index, TYPE, STOCHASTIC, BACKEND)
            if KEEP_ZEROS:
                new = tl.where(old.to(tl.float32) == 0.0, old, new)
            tl.store(pointers, new, mask=mask)


@triton.jit
def split_factors(
    table,
    terms,
    size,
    rank,
    term_rank,
    stride,
    rank_stride,
    BF16_SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Write the terms of each layer's factor as [size, BF16_SPLITS * term_rank], a row for each row or column."""
    layer = tl.program_id(2).to(tl.int64)
    # 64 bits: a factor may have more than 2**31 elements.
    index = (tl.program_id(0) * SIZE + tl.arange(0, SIZE)).to(tl.int64)[:, None]
    ranks = (tl.program_id(1) * RANK + tl.arange(0, RANK)).to(tl.int64)[None, :]
    factor = tl.load(table + layer).to(tl.pointer_type(tl.float32))
    value = tl.load(factor + (index * stride + ranks * rank_stride), mask=(index < size) & (ranks < rank), other=0.0)
    target = terms + (layer * size + index) * (BF16_SPLITS * term_rank) + ranks
    for term in tl.static_range(BF16_SPLITS):
        rounded = to_bfloat16(value, BACKEND)
        value -= rounded.to(tl.float32)
        tl.store(target + term * term_rank, rounded, mask=(index < size) & (ranks < term_rank))


@triton.jit
def add_low_rank_bf16_splits(
    table,
    lefts,
    rights,
    layers,
    rows,
    columns,
    term_rank,
    weight_stride,
    scale,
    seed,
    items,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BF16_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STAGES: tl.constexpr,
    OFFSETS: tl.constexpr,
    BACKEND: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
):
    """Persistent kernel for any rank. An item is a tile; lefts and rights are what split_factors wrote."""
    tile_columns = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * tile_columns
    stride = BF16_SPLITS * term_rank
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        layer = item // tiles
        row = item % tiles // tile_columns * ROWS
        column = item % tile_columns * COLUMNS
        weight = tl.load(table + layer).to(tl.pointer_type(TYPE))
        layer_index = tl.load(table + 3 * layers + layer).to(tl.int32)
        weight_row_stride = weight_stride
        width = columns
        if ALIGNED:
            # The compiler does not know that these are multiples of 8; once it does, it moves 16 bytes at a time.
            weight = tl.multiple_of(weight, 16)
            weight_row_stride = weight_row_stride // 8 * 8
            width = width // 8 * 8
        left = lefts + layer.to(tl.int64) * rows * stride
        right = rights + layer.to(tl.int64) * columns * stride
        pointers, mask = weight_tile(weight, row, column, rows, width, weight_row_stride, ROWS, COLUMNS, OFFSETS)
        old = tl.load(pointers, mask=mask, other=0.0)
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in tl.range(0, term_rank, RANK, num_stages=STAGES):
            left_high, left_middle, left_low = split_factor_tiles(
                left, row, rows, step, term_rank, BF16_SPLITS, ROWS, RANK, OFFSETS
            )  # [ROWS, RANK]
            high, middle, low = split_factor_tiles(
                right, column, columns, step, term_rank, BF16_SPLITS, COLUMNS, RANK, OFFSETS
            )  # [COLUMNS, RANK]
            start = tl.zeros((ROWS, COLUMNS), dtype=tl.float32) if BF16_SPLITS == 3 else product
            of_step = dot_bf16_splits(
                left_high, left_middle, left_low, high.T, middle.T, low.T, start, BF16_SPLITS, BACKEND
            )
            # For float32 weights, tensor cores would lose too much of a sum over a long rank.
            product = product + opaque(of_step, BACKEND) if BF16_SPLITS == 3 else of_step
        exact = old.to(tl.float32) + scale * product
        new = rounded_tile(exact, row, column, columns, seed, layer_index, TYPE, STOCHASTIC, BACKEND)
        if KEEP_ZEROS:
            new = tl.where(old.to(tl.float32) == 0.0, old, new)
        tl.store(pointers, new, mask=mask)
