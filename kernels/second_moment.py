"""Second moments in Triton: total += keysᵀ @ keys for several layers in one launch, lower triangle only.

Formula, for the keys K [tokens, width] of a layer and its total C [width, width], float32:

    C[i, j] += sum over t of K[t, i] * K[t, j]        for j <= i

Tiles. Square blocks of COLUMNS x COLUMNS cover the lower triangle of C; a block is one tile, or two tiles of
ROWS = COLUMNS / 2 rows each, the upper one first. GROUP block rows are walked together, column by column, so that
tiles in flight at one time share keys in the L2 cache. The order of the blocks for 4 block rows and GROUP = 2:

           0  1  2  3   block column
      0  | 0
      1  | 1  2
      2  | 3  5  7
      3  | 4  6  8  9
      block row

Work on one tile: STEP tokens at a time, both operands as they are stored, in one float32 accumulator.

             keys[:, row:row + ROWS]ᵀ  @  keys[:, column:column + COLUMNS]  ->  tile
               [ROWS, STEP]               [STEP, COLUMNS]                       [ROWS, COLUMNS]

An item is a tile, or a share of its tokens where tiles are too few to fill the chip (_common.make_schedule). Tensor
cores truncate their sums, so an item adds its accumulator to memory after at most CHUNK_TOKENS tokens. Items that
share a tile write to slices of scratch memory, which a second kernel adds to the total in order. No two items write to
the same memory: the same operands give the same bytes.

Two kernels do this: one moves operands and results through tensor memory access (TMA; compute capability 9 and 10),
the other through pointers (earlier chips, and addresses or strides that TMA cannot read).

Float32 keys are first split into three bfloat16 terms, high (0), middle (1) and low (2), stored as 3 x term_tokens
rows. The sum then runs over six products of terms, 00, 01, 10, 11, 02 and 20; the others are below the precision of
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from rocr_kernels._common import (
    Schedule,
    address_table,
    capability,
    dot,
    make_schedule,
    max_registers,
    multiprocessors,
    offset_type,
    opaque,
    run_with_scratch,
    to_bfloat16,
)
from torch import Tensor

CHUNK_TOKENS = 8192
"""Most tokens of one accumulator."""

TERM_STEP = 64
"""Rows of a term of float32 keys are a multiple of this, so that no step of a configuration spans two terms."""

SPLIT_BYTES = 1 << 30
"""Most memory for the terms of float32 keys; more keys take several launches."""

SLICE_ROWS = 16
"""Rows of a tile that one program of add_slices adds."""

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

LEFT_TERMS = tl.constexpr(0b10_00_01_01_00_00)
"""Term of the left operand in each of the six products, two bits each, the first product in the lowest bits."""

RIGHT_TERMS = tl.constexpr(0b00_10_01_00_01_00)
"""The same for the right operand."""


# Configurations


@dataclass(frozen=True)
class SecondMomentConfig:
    """Shape of a launch.

    Attributes:
        tma: operands move through TMA (compute capability 9 and 10), not through pointers.
        rows, columns: of a tile; columns is rows or twice rows.
        step: tokens that are multiplied at a time.
        group: block rows that are walked together.
        warps, stages: warps of a program, and steps that are loaded ahead.
        programs: programs on one multiprocessor.
    """

    tma: bool
    rows: int
    columns: int
    step: int
    group: int
    warps: int
    stages: int
    programs: int


CONFIGS = {
    "tma_wide": SecondMomentConfig(True, 128, 256, 64, group=8, warps=8, stages=4, programs=1),
    "tma_small": SecondMomentConfig(True, 128, 128, 64, group=8, warps=8, stages=3, programs=2),
    "tma_bf16_splits": SecondMomentConfig(True, 128, 128, 64, group=8, warps=8, stages=3, programs=1),
    "pointers": SecondMomentConfig(False, 128, 128, 32, group=16, warps=8, stages=4, programs=1),
    "pointers_small": SecondMomentConfig(False, 64, 128, 32, group=16, warps=8, stages=4, programs=1),
    "pointers_bf16_splits": SecondMomentConfig(False, 64, 128, 64, group=16, warps=8, stages=3, programs=1),
}
"""All configurations. Nothing is tuned at run time, because a trial launch would add to the totals."""

WIDE_FROM = 1024
"""Estimated width from which the wide tile is faster despite the products it wastes on the diagonal."""


@dataclass(frozen=True)
class Fits:
    """What the addresses and strides of keys and totals allow.

    Attributes:
        tma: addresses and rows of keys and totals start at multiples of 16 bytes.
        aligned: addresses and rows of keys start at multiples of 16 bytes, and a row is a multiple of 16 bytes long.
    """

    tma: bool
    aligned: bool


def choose_config(compute_capability: tuple[int, int], products: int, width: int, fits: Fits) -> str:
    """Return the name of the configuration for a launch.

    Args:
        compute_capability: of the device.
        products: 1 for 16-bit keys, 6 for the terms of float32 keys.
        width: of the keys.
        fits: what the memory of keys and totals allows.
    """
    if compute_capability[0] in (9, 10) and fits.tma:
        if products > 1:
            return "tma_bf16_splits"
        return "tma_wide" if width >= WIDE_FROM else "tma_small"
    if products > 1:
        return "pointers_bf16_splits"
    return "pointers" if fits.aligned else "pointers_small"


# Functions that the kernels share: order of tiles, shares of items, products


@triton.jit
def triangle_row(index):
    """Row of entry `index` of a lower triangle that is counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The float32 root may be wrong by one.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def block_position(index, blocks, GROUP: tl.constexpr):
    """Block row and block column of block `index` of `blocks` block rows, in the order shown above.

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
def term_offsets(token, term_tokens, PRODUCTS: tl.constexpr):
    """Distances from row `token` to the rows of the left and of the right operand.

    With PRODUCTS = 6, `token` counts through six products of terms of term_tokens rows each.
    """
    if PRODUCTS == 1:
        return token * 0, token * 0
    else:
        product = token // term_tokens
        left_term = (LEFT_TERMS >> (2 * product)) & 3
        right_term = (RIGHT_TERMS >> (2 * product)) & 3
        return (left_term - product) * term_tokens, (right_term - product) * term_tokens


@triton.jit
def halves(tile):
    """Left and right half of a tile."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def add_product(left, right, accumulator, ROUNDED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return accumulator + left @ right; ROUNDED: with a sum rounded to nearest, which float32 keys need."""
    if ROUNDED:
        product = dot(left, right, tl.zeros(accumulator.shape, dtype=tl.float32), INTERPRETED)
        return accumulator + opaque(product, INTERPRETED)
    else:
        return dot(left, right, accumulator, INTERPRETED)


# Kernel that moves operands and results through TMA


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
    INTERPRETED: tl.constexpr,
):
    """Return accumulator + left keysᵀ @ right keys over the tokens from start to end."""
    for token in tl.range(start, end, STEP):
        left_offset, right_offset = term_offsets(token, term_tokens, PRODUCTS)
        left_keys = left.load([token + left_offset, row])  # [STEP, ROWS]
        right_keys = right.load([token + right_offset, column])  # [STEP, COLUMNS]
        accumulator = add_product(left_keys.T, right_keys, accumulator, PRODUCTS > 1, INTERPRETED)
    return accumulator


@triton.jit
def _add_piece_tma(total, slices, is_slice, piece, row, column, slice_row, slice_column, INTERPRETED: tl.constexpr):
    """Add a piece of a tile to the total at (row, column), or to the slice of the tile.

    Elements above the diagonal keep their bits. Adding 0 would change -0.0, NaN and denormals, which the copy engine
    flushes to 0; so a piece that the diagonal crosses is read, and its upper elements are written back unchanged.
    """
    ROWS: tl.constexpr = piece.shape[0]
    COLUMNS: tl.constexpr = piece.shape[1]
    if is_slice:
        _add_block_tma(slices, piece, slice_row, slice_column, INTERPRETED)
    elif row >= column + COLUMNS - 1:
        _add_block_tma(total, piece, row, column, INTERPRETED)
    elif row + ROWS > column:
        rows = row + tl.arange(0, ROWS)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        old = total.load([row, column])
        total.store([row, column], tl.where(rows >= columns, old + piece, old))


@triton.jit
def _add_block_tma(target, piece, row, column, INTERPRETED: tl.constexpr):
    if INTERPRETED:
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
def _wait_for_earlier_adds(INTERPRETED: tl.constexpr):
    """Wait until the earlier adds of this program have reached memory, so that sums have one order."""
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
    INTERPRETED: tl.constexpr,
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
                accumulator, left, right, row, column, chunk, chunk_end, term_tokens, PRODUCTS, STEP, INTERPRETED
            )
            # Added in quarters: a whole float32 tile does not fit in shared memory beside the operands.
            _wait_for_earlier_adds(INTERPRETED)
            left_half, right_half = halves(accumulator)
            piece0, piece1 = halves(left_half)
            piece2, piece3 = halves(right_half)
            to = slice_index * ROWS
            in_slice = slice_index >= 0
            _add_piece_tma(total, slices, in_slice, piece0, row, column, to, 0, INTERPRETED)
            _add_piece_tma(total, slices, in_slice, piece1, row, column + PIECE, to, PIECE, INTERPRETED)
            _add_piece_tma(total, slices, in_slice, piece2, row, column + 2 * PIECE, to, 2 * PIECE, INTERPRETED)
            _add_piece_tma(total, slices, in_slice, piece3, row, column + 3 * PIECE, to, 3 * PIECE, INTERPRETED)


# Kernel that moves them through pointers


@triton.jit
def _load_keys(keys, row, rows, columns, key_stride, limit, width, OFFSETS: tl.constexpr):
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
    INTERPRETED: tl.constexpr,
):
    """Return accumulator + left keysᵀ @ right keys over the tokens from start to end."""
    steps = tl.arange(0, STEP)
    left_columns = (row + tl.arange(0, accumulator.shape[0]))[:, None]
    right_columns = (column + tl.arange(0, accumulator.shape[1]))[None, :]
    for token in tl.range(start, end, STEP):
        left_offset, right_offset = term_offsets(token, term_tokens, PRODUCTS)
        left_keys = _load_keys(
            keys, token + left_offset, steps[None, :], left_columns, key_stride, limit, width, OFFSETS
        )  # [ROWS, STEP]
        right_keys = _load_keys(
            keys, token + right_offset, steps[:, None], right_columns, key_stride, limit, width, OFFSETS
        )  # [STEP, COLUMNS]
        accumulator = add_product(left_keys, right_keys, accumulator, PRODUCTS > 1, INTERPRETED)
    return accumulator


@triton.jit
def _add_piece_pointers(target, piece, row, column, stride, width, OFFSETS: tl.constexpr):
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
    INTERPRETED: tl.constexpr,
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
                INTERPRETED,
            )
            left_half, right_half = halves(accumulator)
            HALF: tl.constexpr = COLUMNS // 2
            _add_piece_pointers(target, left_half, row, column, target_stride, width, OFFSETS)
            _add_piece_pointers(target + HALF, right_half, row, column + HALF, target_stride, width, OFFSETS)


# Kernels that split keys before and add slices after


@triton.jit
def split_keys(
    table,
    terms,
    tokens,
    term_tokens,
    width,
    key_stride,
    term_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write float32 keys as three bfloat16 terms: for each layer all high, then all middle, then all low terms."""
    layer = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(term_stride, COLUMNS)
    token = (tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    keys = tl.load(table + layer).to(tl.pointer_type(tl.float32))
    value = tl.load(keys + token * key_stride + column, mask=(column < width) & (token < tokens), other=0.0)
    for term in tl.static_range(3):
        rounded = to_bfloat16(value, INTERPRETED)
        value -= rounded.to(tl.float32)
        target = terms + ((3 * layer + term) * term_tokens + token) * term_stride + column
        tl.store(target, rounded, mask=(column < term_stride) & (token < term_tokens))


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


# Launch


def accumulate_second_moments(
    totals: Sequence[Tensor], keys: Sequence[Tensor], config: SecondMomentConfig | None = None
) -> None:
    """Add keysᵀ @ keys to the lower triangle of each total, in place.

    Args:
        totals: for each layer (width, width), float32, with unit stride along a row, all of one shape and stride.
        keys: for each layer (tokens, width), bfloat16, float16 or float32, with unit stride along a row, all of one
            shape, stride and dtype; tokens and width are at least 1.
        config: shape of the launch; None for the one that choose_config names.

    Raises:
        ValueError: the layers differ in shape, stride or dtype, or a row does not have unit stride.
        CaptureError: a CUDA graph is being captured.
    """
    _require_alike("totals", totals)
    _require_alike("keys", keys)
    if keys[0].dtype == torch.float32:
        block_tokens = max(
            CHUNK_TOKENS, SPLIT_BYTES // (6 * len(keys) * keys[0].shape[1]) // CHUNK_TOKENS * CHUNK_TOKENS
        )
        for start in range(0, keys[0].shape[0], block_tokens):
            block = [each[start : start + block_tokens] for each in keys]
            _launch(totals, split_into_terms(block), products=6, config=config)
    else:
        _launch(totals, keys, products=1, config=config)


def _require_alike(name: str, tensors: Sequence[Tensor]) -> None:
    first = tensors[0]
    for tensor in tensors:
        if (tensor.shape, tensor.stride(), tensor.dtype) != (first.shape, first.stride(), first.dtype):
            raise ValueError(f"{name} of one launch must have one shape, stride and dtype.")
    if first.shape[1] > 1 and first.stride(1) != 1:
        raise ValueError(f"{name} must have unit stride along a row, but the strides are {first.stride()}.")


def split_into_terms(keys: Sequence[Tensor]) -> list[Tensor]:
    """Split float32 keys into terms, for each layer (3 * tokens, width), bfloat16; both sizes are rounded up."""
    table = address_table([keys])
    tokens, width = keys[0].shape
    term_tokens = -(-tokens // TERM_STEP) * TERM_STEP
    term_width = -(-width // 8) * 8
    terms = keys[0].new_empty((len(keys), 3 * term_tokens, term_width), dtype=torch.bfloat16)
    split_keys[(-(-term_tokens // 64) * -(-term_width // 128), len(keys))](
        table,
        terms,
        tokens,
        term_tokens,
        width,
        keys[0].stride(0),
        term_width,
        TOKENS=64,
        COLUMNS=128,
        INTERPRETED=not terms.is_cuda,
        num_warps=8,
    )
    return list(terms)


def _launch(totals: Sequence[Tensor], keys: Sequence[Tensor], products: int, config: SecondMomentConfig | None) -> None:
    """Launch the items of all layers, then add up the slices of the tiles that items share.

    keys are (tokens, width) where products is 1, and what split_into_terms returns where it is 6.
    """
    table = address_table([keys, totals])
    device, width = totals[0].device, totals[0].shape[0]
    fits = _fits(totals, keys)
    config = config or CONFIGS[choose_config(capability(device), products, width, fits)]
    term_tokens = keys[0].shape[0] // 3 if products == 6 else keys[0].shape[0]
    schedule = _schedule(config, len(keys), width, products * term_tokens, device)
    slices = torch.zeros(max(1, schedule.slices) * config.rows * config.columns, device=device)
    kernel = add_second_moments_tma if config.tma else add_second_moments_pointers
    programs = min(schedule.items, multiprocessors(device) * config.programs)
    run_with_scratch(
        device,
        lambda: kernel[(programs,)](
            table,
            slices,
            len(keys),
            products * term_tokens,
            term_tokens,
            *keys[0].shape,
            width,
            keys[0].stride(0),
            totals[0].stride(0),
            schedule.whole,
            schedule.splits,
            schedule.split_tokens,
            schedule.items,
            KEY_TYPE=TYPES[keys[0].dtype],
            PRODUCTS=products,
            CHUNK_TOKENS=CHUNK_TOKENS,
            ROWS=config.rows,
            COLUMNS=config.columns,
            STEP=config.step,
            GROUP=config.group,
            OFFSETS=offset_type(config.step * keys[0].stride(0), config.rows * totals[0].stride(0)),
            INTERPRETED=device.type != "cuda",
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=max_registers(config.programs, config.warps),
            **({"ONE_LAYER": len(keys) == 1} if config.tma else {"ALIGNED": fits.aligned}),
        ),
    )
    if schedule.slices:
        _add_slices(table, slices, totals, schedule, config)


def _fits(totals: Sequence[Tensor], keys: Sequence[Tensor]) -> Fits:
    on_16_bytes = all(each.data_ptr() % 16 == 0 for each in (*keys, *totals))
    tma = on_16_bytes and keys[0].stride(0) % 8 == 0 and totals[0].stride(0) % 4 == 0
    aligned = all(each.data_ptr() % 16 == 0 for each in keys) and keys[0].stride(0) % 8 == 0
    return Fits(tma, aligned and keys[0].shape[1] % 8 == 0)


def _schedule(config: SecondMomentConfig, layers: int, width: int, tokens: int, device: torch.device) -> Schedule:
    blocks = -(-width // config.columns)
    tiles = layers * blocks * (blocks + 1) // 2 * (config.columns // config.rows)
    return make_schedule(tiles, tokens, multiprocessors(device) * config.programs, config.step)


def _add_slices(
    table: Tensor, slices: Tensor, totals: Sequence[Tensor], schedule: Schedule, config: SecondMomentConfig
) -> None:
    add_slices[(schedule.tiles - schedule.whole, config.rows // SLICE_ROWS)](
        table,
        slices,
        len(totals),
        totals[0].shape[0],
        totals[0].stride(0),
        schedule.whole,
        schedule.splits,
        ROWS=config.rows,
        COLUMNS=config.columns,
        GROUP=config.group,
        SLICE_ROWS=SLICE_ROWS,
        num_warps=4,
    )
