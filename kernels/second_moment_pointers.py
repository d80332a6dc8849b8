"""Second moments through plain pointers: for sm_80 to sm_89, and for keys that TMA cannot read."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels.bits import add_product
from rocr_kernels.triangle import add_below_diagonal, halves, item_share, part_rows, tile_position


@triton.jit
def _load_keys(keys, row, rows, columns, key_stride, limit, width, OFFSETS: tl.constexpr):
    """Keys of some columns at row + rows; rows from limit on and columns from width on are 0.

    rows is (STEP, 1) with columns (1, n), or (1, STEP) with columns (n, 1) for the transposed tile.
    """
    # The first row needs 64 bits; offsets from it stay the same from step to step, and are of type OFFSETS.
    pointers = keys + tl.cast(row, tl.int64) * key_stride + (rows * tl.cast(key_stride, OFFSETS) + columns)
    return tl.load(pointers, mask=(rows < limit - row) & (columns < width), other=0.0)


@triton.jit
def _add_products(
    accumulator,
    keys,
    row,
    column,
    key_stride,
    limit,
    width,
    start,
    end,
    part_tokens,
    PRODUCTS: tl.constexpr,
    STEP: tl.constexpr,
    OFFSETS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return accumulator + left keysᵀ right keys over the tokens start to end."""
    steps = tl.arange(0, STEP)
    left_columns = (row + tl.arange(0, accumulator.shape[0]))[:, None]
    right_columns = (column + tl.arange(0, accumulator.shape[1]))[None, :]
    for token in tl.range(start, end, STEP):
        left_offset, right_offset = part_rows(token, part_tokens, PRODUCTS)
        left_keys = _load_keys(
            keys, token + left_offset, steps[None, :], left_columns, key_stride, limit, width, OFFSETS
        )
        right_keys = _load_keys(
            keys, token + right_offset, steps[:, None], right_columns, key_stride, limit, width, OFFSETS
        )
        accumulator = add_product(left_keys, right_keys, accumulator, PRODUCTS > 1, INTERPRETED)
    return accumulator


@triton.jit
def add_second_moments_pointers(
    table,
    slices,
    layers,
    tokens,
    part_tokens,
    key_rows,
    key_width,
    width,
    key_stride,
    total_stride,
    whole,
    splits,
    split_tokens,
    items,
    KEY_TYPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Persistent kernel: each program takes items; the arguments are those of second_moment._launch."""
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        tile, start, end, slice_index = item_share(item, whole, splits, split_tokens, tokens)
        layer, row, column = tile_position(tile, width, ROWS, COLUMNS, GROUP)
        address = tl.load(table + layer)
        stride = key_stride
        if ALIGNED:
            # They are multiples already; said so, the compiler reads 16 bytes at once.
            stride = stride // 8 * 8
            key_width = key_width // 8 * 8
        keys = address.to(tl.pointer_type(KEY_TYPE))
        if ALIGNED:
            keys = tl.multiple_of(keys, 16)

        is_slice = slice_index >= 0
        own_slice = slices.to(tl.int64) + slice_index.to(tl.int64) * (ROWS * COLUMNS * 4)
        in_total = tl.load(table + layers + layer) + (row.to(tl.int64) * total_stride + column) * 4
        target = tl.where(is_slice, own_slice, in_total).to(tl.pointer_type(tl.float32))
        target_stride = tl.where(is_slice, COLUMNS, total_stride)

        end = tl.where(row < width, end, start)
        for chunk in tl.range(start, end, CHUNK_TOKENS):
            chunk_end = tl.minimum(chunk + CHUNK_TOKENS, end)
            accumulator = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            accumulator = _add_products(
                accumulator,
                keys,
                row,
                column,
                stride,
                key_rows,
                key_width,
                chunk,
                chunk_end,
                part_tokens,
                PRODUCTS,
                STEP,
                OFFSETS,
                INTERPRETED,
            )
            left_half, right_half = halves(accumulator)
            HALF: tl.constexpr = COLUMNS // 2
            add_below_diagonal(target, left_half, row, column, target_stride, width, OFFSETS)
            add_below_diagonal(target + HALF, right_half, row, column + HALF, target_stride, width, OFFSETS)
