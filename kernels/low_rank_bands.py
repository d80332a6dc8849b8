"""Low-rank updates of middling rank on sm_90: left and weight stream through TMA past what a program keeps of right."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels.bits import dot_of_parts, in_parts
from rocr_kernels.low_rank_tiles import band_of_item, rounded_tile


@triton.jit
def add_low_rank_bands(
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
    INTERPRETED: tl.constexpr,
):
    """Persistent kernel for ranks up to RANK; lefts is what split_factors wrote, (layers * rows, 2 * RANK).

    The parts of right stay in shared memory: read again for every tile, they would keep the L2 cache busier than the
    tensor cores. Sums and rounding stay in the layout of the products, so nothing is exchanged between threads.
    """
    tile_columns = tl.cdiv(columns, COLUMNS)
    left = tl.make_tensor_descriptor(lefts, [layers * rows, 2 * RANK], [2 * RANK, 1], [ROWS, RANK])
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        band, first_row, last_row = band_of_item(item, whole, splits, split_rows, rows)
        layer = band // tile_columns
        column = band % tile_columns * COLUMNS
        address = tl.load(table + layer).to(tl.pointer_type(TYPE))
        factor = tl.load(table + 2 * layers + layer).to(tl.pointer_type(tl.float32))
        right = tl.make_tensor_descriptor(
            factor, [rank, columns], [tl.cast(right_stride, tl.int64), 1], [RANK, COLUMNS]
        )
        stride = tl.cast(weight_stride, tl.int64)
        weight = tl.make_tensor_descriptor(address, [rows, columns], [stride, 1], [ROWS, COLUMNS])
        high, middle, low = in_parts(right.load([0, column]), 2, INTERPRETED)
        for row in tl.range(first_row, last_row, ROWS, num_stages=STAGES):
            # Rows beyond the last of a layer are those of the next one: their tile's part is not stored.
            left_high = left.load([layer * rows + row, 0])
            left_middle = left.load([layer * rows + row, RANK])
            old = weight.load([row, column])
            product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            product = dot_of_parts(left_high, left_middle, left_middle, high, middle, low, product, 2, INTERPRETED)
            exact = old.to(tl.float32) + scale * product
            weight.store([row, column], rounded_tile(exact, row, column, columns, 0, 0, TYPE, False, INTERPRETED))
