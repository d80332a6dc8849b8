"""Where a work item of a second moment lies: its tile of the lower triangle, its tokens, its operand rows."""

from __future__ import annotations

import triton
import triton.language as tl

LEFT_PARTS = tl.constexpr(0b10_00_01_01_00_00)
RIGHT_PARTS = tl.constexpr(0b00_10_01_00_01_00)


@triton.jit
def triangle_row(index):
    """Row of entry `index` of a lower triangle that is counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def block_position(index, blocks, GROUP: tl.constexpr):
    """Row and column of square block `index` of a lower triangle of `blocks` block rows.

    GROUP block rows are walked column by column, so that blocks in flight at one time share operands in L2.
    """
    first = triangle_row(index) // GROUP * GROUP
    height = tl.minimum(GROUP, blocks - first)
    within = index - first * (first + 1) // 2
    corner = tl.maximum(within - first * height, 0)
    corner_row = triangle_row(corner)
    in_rectangle = within < first * height
    row = first + tl.where(in_rectangle, within % height, corner_row)
    column = tl.where(in_rectangle, within // height, first + corner - corner_row * (corner_row + 1) // 2)
    return row, column


@triton.jit
def tile_position(tile, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Layer, first row and first column of a tile; COLUMNS // ROWS tiles make up one square block."""
    HALVES: tl.constexpr = COLUMNS // ROWS
    blocks = tl.cdiv(width, COLUMNS)
    tiles = blocks * (blocks + 1) // 2 * HALVES
    within = tile % tiles
    block_row, block_column = block_position(within // HALVES, blocks, GROUP)
    return tile // tiles, block_row * COLUMNS + within % HALVES * ROWS, block_column * COLUMNS


@triton.jit
def item_share(item, whole, splits, split_tokens, tokens):
    """Tile of an item, the tokens from start to end that it sums, and its slice (negative: the total itself)."""
    slice_index = item - whole
    is_slice = slice_index >= 0
    tile = tl.where(is_slice, whole + slice_index // splits, item)
    start = tl.where(is_slice, slice_index % splits * split_tokens, 0)
    end = tl.where(is_slice, tl.minimum(start + split_tokens, tokens), tokens)
    return tile, start, end, slice_index


@triton.jit
def part_rows(token, part_tokens, PRODUCTS: tl.constexpr):
    """How far from its token the left and the right operand's row lies.

    Float32 keys are three bfloat16 parts, high, middle and low, of part_tokens rows each. The sum runs over six
    products of parts, each over all tokens: 00, 01, 10, 11, 02, 20; the others lie below float32's precision.
    """
    if PRODUCTS == 1:
        return token * 0, token * 0
    else:
        product = token // part_tokens
        left_part = (LEFT_PARTS >> (2 * product)) & 3
        right_part = (RIGHT_PARTS >> (2 * product)) & 3
        return (left_part - product) * part_tokens, (right_part - product) * part_tokens


@triton.jit
def halves(tile):
    """Left and right half of a tile."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def add_below_diagonal(target, piece, row, column, stride, width, OFFSETS: tl.constexpr):
    """Add a piece of a tile, at row and column of the total, to the memory that this program alone writes.

    What lies above the diagonal is neither read nor written; stride is that of the rows at target, OFFSETS the type
    that holds the distances of a tile's numbers.
    """
    rows = tl.arange(0, piece.shape[0])[:, None]
    columns = tl.arange(0, piece.shape[1])[None, :]
    lower = (row + rows >= column + columns) & (row + rows < width)
    pointers = target + (rows * tl.cast(stride, OFFSETS) + columns)
    tl.store(pointers, tl.load(pointers, mask=lower) + piece, mask=lower)
