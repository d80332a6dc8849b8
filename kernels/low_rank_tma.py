"""The kernel of low-rank updates that moves weights and left factors through tensor memory access (TMA)."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels._common import split_bf16
from rocr_kernels.low_rank_tiles import dot_bf16_splits, rounded_tile, strip_of_item


@triton.jit
def add_low_rank_column_strips(
    table,
    lefts,
    layers,
    rows,
    columns,
    rank,
    weight_stride,
    right_stride,
    scale,
    whole,
    splits,
    split_rows,
    items,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STAGES: tl.constexpr,
    BACKEND: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
):
    """Persistent kernel for ranks up to RANK. lefts is what split_factors wrote, [layers * rows, 2 * RANK].

    The terms of right stay in shared memory: reading them again for every tile would keep the L2 cache busier than
    the tensor cores. Sums and rounding keep the layout of the products, so threads exchange nothing.
    """
    tile_columns = tl.cdiv(columns, COLUMNS)
    left = tl.make_tensor_descriptor(lefts, [layers * rows, 2 * RANK], [2 * RANK, 1], [ROWS, RANK])
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        strip, first_row, last_row = strip_of_item(item, whole, splits, split_rows, rows)
        layer = strip // tile_columns
        column = strip % tile_columns * COLUMNS
        address = tl.load(table + layer).to(tl.pointer_type(TYPE))
        factor = tl.load(table + 2 * layers + layer).to(tl.pointer_type(tl.float32))
        right = tl.make_tensor_descriptor(
            factor, [rank, columns], [tl.cast(right_stride, tl.int64), 1], [RANK, COLUMNS]
        )
        stride = tl.cast(weight_stride, tl.int64)
        weight = tl.make_tensor_descriptor(address, [rows, columns], [stride, 1], [ROWS, COLUMNS])
        high, middle, low = split_bf16(right.load([0, column]), 2, BACKEND)
        for row in tl.range(first_row, last_row, ROWS, num_stages=STAGES):
            # Rows of left beyond the last row of a layer belong to the next layer; their results are not stored.
            left_high = left.load([layer * rows + row, 0])
            left_middle = left.load([layer * rows + row, RANK])
            old = weight.load([row, column])
            product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            product = dot_bf16_splits(left_high, left_middle, left_middle, high, middle, low, product, 2, BACKEND)
            exact = old.to(tl.float32) + scale * product
            new = rounded_tile(exact, row, column, columns, 0, 0, TYPE, False, BACKEND)
            if KEEP_ZEROS:
                new = tl.where(old.to(tl.float32) == 0.0, old, new)
            weight.store([row, column], new)
