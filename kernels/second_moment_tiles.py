"""The tiles of a total that the kernels of second moments share: their order, their shares of tokens, and their slices.

Square blocks of COLUMNS x COLUMNS cover the lower triangle of a total; second_moment.py shows their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def triangle_row(index):
    """Row of entry `index` of a lower triangle that is counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The float32 root may be wrong by one.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def block_position(index, blocks, GROUP: tl.constexpr):
    """Block row and block column of block `index` of `blocks` block rows, in the order that second_moment.py shows.

    A group is a rectangle, walked column by column, and the triangle on its right, walked row by row.
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
    """Layer, first row and first column of a tile."""
    HALVES: tl.constexpr = COLUMNS // ROWS
    blocks = tl.cdiv(width, COLUMNS)
    tiles = blocks * (blocks + 1) // 2 * HALVES
    within = tile % tiles
    block_row, block_column = block_position(within // HALVES, blocks, GROUP)
    return tile // tiles, block_row * COLUMNS + within % HALVES * ROWS, block_column * COLUMNS


@triton.jit
def item_share(item, whole, splits, split_tokens, tokens):
    """Tile of an item, its first token, the end of its tokens, and its slice (negative: it adds to the total)."""
    slice_index = item - whole
    is_slice = slice_index >= 0
    tile = tl.where(is_slice, whole + slice_index // splits, item)
    start = tl.where(is_slice, slice_index % splits * split_tokens, 0)
    end = tl.where(is_slice, tl.minimum(start + split_tokens, tokens), tokens)
    return tile, start, end, slice_index


@triton.jit
def halves(tile):
    """Left and right half of a tile."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def add_slices(
    table,
    slices,
    layers,
    width,
    total_stride,
    whole,
    splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SLICE_ROWS: tl.constexpr,
):
    """Add SLICE_ROWS rows of the slices of one tile to its total, the first slice first."""
    first_slice = tl.program_id(0) * splits
    layer, row, column = tile_position(whole + tl.program_id(0), width, ROWS, COLUMNS, GROUP)
    rows = tl.program_id(1) * SLICE_ROWS + tl.arange(0, SLICE_ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    lower = (row + rows >= column + columns) & (row + rows < width)
    source = slices + first_slice.to(tl.int64) * (ROWS * COLUMNS) + rows * COLUMNS + columns
    total = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
    target = total + (row + rows).to(tl.int64) * total_stride + column + columns
    value = tl.zeros((SLICE_ROWS, COLUMNS), dtype=tl.float32)
    for split in tl.range(0, splits):
        value += tl.load(source + tl.cast(split, tl.int64) * (ROWS * COLUMNS), mask=lower, other=0.0)
    tl.store(target, tl.load(target, mask=lower, other=0.0) + value, mask=lower)
