"""The kernel of second moments that moves operands and results through tensor memory access (TMA)."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels.second_moment_terms import add_product, term_offsets
from rocr_kernels.second_moment_tiles import halves, item_share, tile_position


@triton.jit
def _add_products_tma(
    accumulator,
    left,
    right,
    row,
    column,
    start,
    end,
    term_tokens,
    PRODUCTS: tl.constexpr,
    STEP: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Return accumulator + left keysᵀ @ right keys over the tokens from start to end."""
    for token in tl.range(start, end, STEP, warp_specialize=SPECIALIZED):
        left_offset, right_offset = term_offsets(token, term_tokens, PRODUCTS)
        left_keys = left.load([token + left_offset, row])  # [STEP, ROWS]
        right_keys = right.load([token + right_offset, column])  # [STEP, COLUMNS]
        accumulator = add_product(left_keys.T, right_keys, accumulator, PRODUCTS > 1, BACKEND)
    return accumulator


@triton.jit
def _add_piece_tma(total, slices, is_slice, piece, row, column, slice_row, slice_column, BACKEND: tl.constexpr):
    """Add a piece of a tile to the total at (row, column), or to the slice of the tile.

    Elements above the diagonal keep their bits. Adding 0 would change -0.0, NaN and denormals, which the copy engine
    flushes to 0; so a piece that the diagonal crosses is read, and its upper elements are written back unchanged.
    """
    ROWS: tl.constexpr = piece.shape[0]
    COLUMNS: tl.constexpr = piece.shape[1]
    if is_slice:
        _add_block_tma(slices, piece, slice_row, slice_column, BACKEND)
    elif row >= column + COLUMNS - 1:
        _add_block_tma(total, piece, row, column, BACKEND)
    elif row + ROWS > column:
        rows = row + tl.arange(0, ROWS)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        old = total.load([row, column])
        total.store([row, column], tl.where(rows >= columns, old + piece, old))


@triton.jit
def _add_block_tma(target, piece, row, column, BACKEND: tl.constexpr):
    if BACKEND == "interpreter":
        target.store([row, column], target.load([row, column]) + piece)
    else:
        target.atomic_add([row, column], piece)


@triton.jit
def _describe_layer(
    table,
    layer,
    layers,
    key_rows,
    key_width,
    width,
    key_stride,
    total_stride,
    KEY_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """TMA descriptors of a layer's keys as left operand, of its keys as right operand, and of its total."""
    keys = tl.load(table + layer).to(tl.pointer_type(KEY_TYPE))
    total = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
    left = tl.make_tensor_descriptor(keys, [key_rows, key_width], [key_stride, 1], [STEP, ROWS])
    right = tl.make_tensor_descriptor(keys, [key_rows, key_width], [key_stride, 1], [STEP, COLUMNS])
    return left, right, tl.make_tensor_descriptor(total, [width, width], [total_stride, 1], [ROWS, COLUMNS // 4])


@triton.jit
def _wait_for_earlier_adds(BACKEND: tl.constexpr):
    """Wait until the earlier adds of this program have reached memory, so that sums have one order."""
    if BACKEND != "interpreter":
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def add_second_moments_tma(
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
    ONE_LAYER: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Persistent kernel: each program takes items in turn. The arguments are those that _launch passes."""
    PIECE: tl.constexpr = COLUMNS // 4
    slice_tiles = tl.maximum(items - whole, 1)
    slices = tl.make_tensor_descriptor(slices, [slice_tiles * ROWS, COLUMNS], [COLUMNS, 1], [ROWS, PIECE])
    if ONE_LAYER:
        # Building descriptors takes microseconds: do it once for a program, not once for an item.
        left, right, total = _describe_layer(
            table, 0, 1, key_rows, key_width, width, key_stride, total_stride, KEY_TYPE, ROWS, COLUMNS, STEP
        )
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        tile, start, end, slice_index = item_share(item, whole, splits, split_tokens, tokens)
        layer, row, column = tile_position(tile, width, ROWS, COLUMNS, GROUP)
        if not ONE_LAYER:
            left, right, total = _describe_layer(
                table,
                layer,
                layers,
                key_rows,
                key_width,
                width,
                key_stride,
                total_stride,
                KEY_TYPE,
                ROWS,
                COLUMNS,
                STEP,
            )
        # The lower tile of the last diagonal block may lie outside the total: it sums no tokens.
        end = tl.where(row < width, end, start)
        for chunk in tl.range(start, end, CHUNK_TOKENS):
            chunk_end = tl.minimum(chunk + CHUNK_TOKENS, end)
            accumulator = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            accumulator = _add_products_tma(
                accumulator,
                left,
                right,
                row,
                column,
                chunk,
                chunk_end,
                term_tokens,
                PRODUCTS,
                STEP,
                SPECIALIZED,
                BACKEND,
            )
            # Added in quarters: a whole float32 tile does not fit in shared memory beside the operands.
            _wait_for_earlier_adds(BACKEND)
            left_half, right_half = halves(accumulator)
            piece0, piece1 = halves(left_half)
            piece2, piece3 = halves(right_half)
            to = slice_index * ROWS
            in_slice = slice_index >= 0
            _add_piece_tma(total, slices, in_slice, piece0, row, column, to, 0, BACKEND)
            _add_piece_tma(total, slices, in_slice, piece1, row, column + PIECE, to, PIECE, BACKEND)
            _add_piece_tma(total, slices, in_slice, piece2, row, column + 2 * PIECE, to, 2 * PIECE, BACKEND)
            _add_piece_tma(total, slices, in_slice, piece3, row, column + 3 * PIECE, to, 3 * PIECE, BACKEND)
