"""The kernel of second moments that moves operands and results through pointers."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels.second_moment_terms import add_product, term_offsets
from rocr_kernels.second_moment_tiles import halves, item_share, tile_position


@triton.jit
def load_keys(keys, row, rows, columns, key_stride, limit, width, OFFSETS: tl.constexpr):
    """Load the keys at row + rows and columns; 0 for rows from `limit` on and columns from `width` on.

    rows is [STEP, 1] with columns [1, n], or [1, STEP] with columns [n, 1] for the transposed tile.
    """
    # The first row needs 64 bits. The offsets from it are the same in every step and have the type OFFSETS.
    pointers = keys + tl.cast(row, tl.int64) * key_stride + (rows * tl.cast(key_stride, OFFSETS) + columns)
    return tl.load(pointers, mask=(rows < limit - row) & (columns < width), other=0.0)


@triton.jit
def _add_products_pointers(
    accumulator,
    keys,
    row,
    column,
    key_stride,
    limit,
    width,
    start,
    end,
    term_tokens,
    PRODUCTS: tl.constexpr,
    STEP: tl.constexpr,
    OFFSETS: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Return accumulator + left keysᵀ @ right keys over the tokens from start to end."""
    steps = tl.arange(0, STEP)
    left_columns = (row + tl.arange(0, accumulator.shape[0]))[:, None]
    right_columns = (column + tl.arange(0, accumulator.shape[1]))[None, :]
    for token in tl.range(start, end, STEP):
        left_offset, right_offset = term_offsets(token, term_tokens, PRODUCTS)
        left_keys = load_keys(
            keys, token + left_offset, steps[None, :], left_columns, key_stride, limit, width, OFFSETS
        )  # [ROWS, STEP]
        right_keys = load_keys(
            keys, token + right_offset, steps[:, None], right_columns, key_stride, limit, width, OFFSETS
        )  # [STEP, COLUMNS]
        accumulator = add_product(left_keys, right_keys, accumulator, PRODUCTS > 1, BACKEND)
    return accumulator


@triton.jit
def add_piece_pointers(target, piece, row, column, stride, width, OFFSETS: tl.constexpr):
    """Add a piece of a tile, at (row, column) of the total, to target, which no other program writes.

    Elements above the diagonal are neither read nor written. stride is the distance of rows at target.
    """
    rows = tl.arange(0, piece.shape[0])[:, None]
    columns = tl.arange(0, piece.shape[1])[None, :]
    lower = (row + rows >= column + columns) & (row + rows < width)
    pointers = target + (rows * tl.cast(stride, OFFSETS) + columns)
    tl.store(pointers, tl.load(pointers, mask=lower) + piece, mask=lower)


@triton.jit
def add_second_moments_pointers(
    table,
    slices,
    layers,
    tokens,
    term_tokens,
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
    BACKEND: tl.constexpr,
):
    """Persistent kernel: each program takes items in turn. The arguments are those that _launch passes."""
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        tile, start, end, slice_index = item_share(item, whole, splits, split_tokens, tokens)
        layer, row, column = tile_position(tile, width, ROWS, COLUMNS, GROUP)
        address = tl.load(table + layer)
        stride = key_stride
        if ALIGNED:
            # The compiler does not know that these are multiples of 8; once it does, it loads 16 bytes at a time.
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

        # The lower tile of the last diagonal block may lie outside the total: it sums no tokens.
        end = tl.where(row < width, end, start)
        for chunk in tl.range(start, end, CHUNK_TOKENS):
            chunk_end = tl.minimum(chunk + CHUNK_TOKENS, end)
            accumulator = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            accumulator = _add_products_pointers(
                accumulator,
                keys,
                row,
                column,
                stride,
                key_rows,
                key_width,
                chunk,
                chunk_end,
                term_tokens,
                PRODUCTS,
                STEP,
                OFFSETS,
                BACKEND,
            )
            left_half, right_half = halves(accumulator)
            HALF: tl.constexpr = COLUMNS // 2
            add_piece_pointers(target, left_half, row, column, target_stride, width, OFFSETS)
            add_piece_pointers(target + HALF, right_half, row, column + HALF, target_stride, width, OFFSETS)
