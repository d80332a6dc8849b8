"""Second moments for sm_90 and later: operands and results move through tensor memory access (TMA)."""

from __future__ import annotations

import triton
import triton.language as tl
from rocr_kernels.bits import dot
from rocr_kernels.triangle import halves, item_share, part_rows, tile_position


@triton.jit
def _add_products(
    accumulator,
    left,
    right,
    row,
    column,
    start,
    end,
    part_tokens,
    PRODUCTS: tl.constexpr,
    STEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return accumulator + left keysᵀ right keys over the tokens start to end."""
    left_offset, right_offset = part_rows(start, part_tokens, PRODUCTS)
    for token in tl.range(start, end, STEP):
        left_keys = left.load([token + left_offset, row])
        right_keys = right.load([token + right_offset, column])
        accumulator = dot(left_keys.T, right_keys, accumulator, INTERPRETED)
    return accumulator


@triton.jit
def _add_piece(target, piece, row, column, offset, INTERPRETED: tl.constexpr):
    """Add a piece of a tile at row and column of the target, whose blocks have its shape.

    What lies above the diagonal is left as it is; offset is the piece's first column in the total less its first row.
    """
    rows = tl.arange(0, piece.shape[0])[:, None]
    columns = tl.arange(0, piece.shape[1])[None, :]
    piece = tl.where(rows >= columns + offset, piece, 0.0)
    if INTERPRETED:
        target.store([row, column], target.load([row, column]) + piece)
    else:
        target.atomic_add([row, column], piece)


@triton.jit
def _await_earlier_adds(INTERPRETED: tl.constexpr):
    """Wait until this program's earlier adds have reached memory: sums are then taken in one order, always."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def add_second_moments_tma(
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
    CHUNK_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Persistent kernel: each program takes items; the arguments are those of second_moment._launch."""
    PIECE: tl.constexpr = COLUMNS // 4
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        tile, start, end, slice_index = item_share(item, whole, splits, split_tokens, tokens)
        layer, row, column = tile_position(tile, width, ROWS, COLUMNS, GROUP)
        keys = tl.load(table + layer).to(tl.pointer_type(KEY_TYPE))
        left = tl.make_tensor_descriptor(keys, [key_rows, key_width], [key_stride, 1], [STEP, ROWS])
        right = tl.make_tensor_descriptor(keys, [key_rows, key_width], [key_stride, 1], [STEP, COLUMNS])

        is_slice = slice_index >= 0
        own_slice = slices.to(tl.int64) + slice_index.to(tl.int64) * (ROWS * COLUMNS * 4)
        target = tl.make_tensor_descriptor(
            tl.where(is_slice, own_slice, tl.load(table + layers + layer)).to(tl.pointer_type(tl.float32)),
            [tl.where(is_slice, ROWS, width), tl.where(is_slice, COLUMNS, width)],
            [tl.where(is_slice, COLUMNS, total_stride).to(tl.int64), 1],
            [ROWS, PIECE],
        )
        to_row = tl.where(is_slice, 0, row)
        to_column = tl.where(is_slice, 0, column)
        offset = column - row
        # Half of the last diagonal block may lie outside: it has no tokens to sum.
        end = tl.where(row < width, end, start)
        for chunk in tl.range(start, end, CHUNK_TOKENS):
            chunk_end = tl.minimum(chunk + CHUNK_TOKENS, end)
            accumulator = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            if BLOCK_TOKENS == CHUNK_TOKENS:
                accumulator = _add_products(
                    accumulator, left, right, row, column, chunk, chunk_end, part_tokens, PRODUCTS, STEP, INTERPRETED
                )
            else:
                for block in tl.range(chunk, chunk_end, BLOCK_TOKENS):
                    block_end = tl.minimum(block + BLOCK_TOKENS, chunk_end)
                    partial = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
                    accumulator += _add_products(
                        partial, left, right, row, column, block, block_end, part_tokens, PRODUCTS, STEP, INTERPRETED
                    )

            # In quarters, because a whole float32 tile does not fit in shared memory beside the operands.
            _await_earlier_adds(INTERPRETED)
            left_half, right_half = halves(accumulator)
            piece0, piece1 = halves(left_half)
            piece2, piece3 = halves(right_half)
            _add_piece(target, piece0, to_row, to_column, offset, INTERPRETED)
            _add_piece(target, piece1, to_row, to_column + PIECE, offset + PIECE, INTERPRETED)
            _add_piece(target, piece2, to_row, to_column + 2 * PIECE, offset + 2 * PIECE, INTERPRETED)
            _add_piece(target, piece3, to_row, to_column + 3 * PIECE, offset + 3 * PIECE, INTERPRETED)
