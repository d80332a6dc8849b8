"""Low-rank updates in Triton: weight += scale * left @ right, in place, for many layers in one launch.

Formula, for a weight W [rows, columns], left [rows, rank] and right [rank, columns], float32:

    W[i, j] = round(W[i, j] + scale * sum over k of left[i, k] * right[k, j])

Each element of a weight is read once and written once. The sum is float32 and is rounded once, to nearest even or
stochastically. Tensor cores multiply the float32 factors as bf16 splits (_common.py): two terms for 16-bit weights,
whose rounding is far coarser than the 2**-16 that two terms lose, and three terms, which lose nothing, for float32
weights. The products of terms are added smallest first: high @ middle, middle @ high, high @ high, and with three terms
high @ low, low @ high and middle @ middle before them.

Tiles. A tile is ROWS x COLUMNS elements of a weight. Three kinds of launch differ in what stays with a program:

    resident, column_strips: an item is a column strip, a column of tiles or a range of its rows. The strip's part of
    right stays with the program; the tiles of the weight and rows of left stream past it.

                          right  [RANK, COLUMNS]   loaded and split once for an item
                            |
        left [ROWS, RANK] --+-- weight tile, row 0
        left [ROWS, RANK] --+-- weight tile, row ROWS
        left [ROWS, RANK] --+-- weight tile, row 2 * ROWS
                           ...

    resident: rank up to 32; right stays in registers, everything moves through pointers, any layout.
    column_strips: rank up to 128, compute capability 9, 16-bit weights; left is split by split_factors before, right
    stays in shared memory, and left and weight move through tensor memory access (TMA).

    bf16_splits: any rank; an item is one tile. split_factors splits both factors first, and the program sums over the
    rank, RANK columns of left and rows of right at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from rocr_kernels._common import (
    address_table,
    capability,
    dot,
    has_small_shared_memory,
    max_registers,
    multiprocessors,
    offset_type,
    opaque,
    random_bits,
    round_stochastic,
    run_with_scratch,
    split_bf16,
    to_bfloat16,
)
from torch import Tensor

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

SPLIT_BYTES = 1 << 30
"""Most memory for the bf16 splits of the factors of one launch; more layers take several launches."""

STRIP_TILES = 4
"""Estimated cost of starting a column strip (its addresses and its part of right), in tiles of a weight."""


# Configurations


@dataclass(frozen=True)
class LowRankConfig:
    """Shape of a launch.

    Attributes:
        kind: "resident", "column_strips" or "bf16_splits"; the module's docstring describes them.
        bf16_splits: bfloat16 terms of a factor, 2 or 3.
        rows, columns: of a tile.
        rank: largest rank of a launch; for "bf16_splits" the step of the sum over the rank.
        warps, stages: warps of a program, and steps that are loaded ahead.
        programs: programs on one multiprocessor; the registers of a thread follow from it.
    """

    kind: str
    bf16_splits: int
    rows: int
    columns: int
    rank: int
    warps: int
    stages: int
    programs: int


CONFIGS = {
    "resident_16": LowRankConfig("resident", 2, 32, 128, rank=16, warps=4, stages=3, programs=4),
    "resident_32": LowRankConfig("resident", 2, 64, 64, rank=32, warps=4, stages=3, programs=3),
    "resident_16_float32": LowRankConfig("resident", 3, 64, 64, rank=16, warps=4, stages=3, programs=2),
    "resident_32_float32": LowRankConfig("resident", 3, 64, 64, rank=32, warps=4, stages=3, programs=2),
    "column_strips_64": LowRankConfig("column_strips", 2, 64, 128, rank=64, warps=4, stages=3, programs=1),
    "column_strips_128": LowRankConfig("column_strips", 2, 64, 128, rank=128, warps=4, stages=3, programs=1),
    "bf16_splits": LowRankConfig("bf16_splits", 2, 128, 128, rank=32, warps=8, stages=3, programs=1),
    "bf16_splits_float32": LowRankConfig("bf16_splits", 3, 128, 64, rank=32, warps=8, stages=3, programs=1),
}
"""All configurations. Nothing is tuned at run time, because a trial launch would change the weights."""


def choose_config(compute_capability: tuple[int, int], dtype: torch.dtype, rank: int, tma: bool) -> str:
    """Return the name of the configuration for a launch.

    Args:
        compute_capability: of the device.
        dtype: of the weights.
        rank: of the update.
        tma: TMA can move the weights, and rounding is to nearest; stochastic rounding needs another layout.
    """
    suffix = "_float32" if dtype == torch.float32 else ""
    if rank > 32 or (suffix and has_small_shared_memory(compute_capability)):
        if rank <= 128 and tma and not suffix and compute_capability[0] == 9:
            return f"column_strips_{64 if rank <= 64 else 128}"
        return "bf16_splits" + suffix
    return f"resident_{16 if rank <= 16 else 32}{suffix}"


def resident_programs(compute_capability: tuple[int, int], config: LowRankConfig, stochastic: bool) -> int:
    """Programs of a "resident" launch on one multiprocessor; one multiplies while another waits for memory.

    At most two where random bits take registers, or where a program has little shared memory.
    """
    return min(2, config.programs) if stochastic or has_small_shared_memory(compute_capability) else config.programs


@dataclass(frozen=True)
class ColumnStrips:
    """The items of a launch over column strips. An item walks down a column of tiles, or a range of its tiles.

    Attributes:
        columns: number of columns of tiles of all layers.
        whole: number of columns, the first ones, that are one item each.
        splits: number of items that share each remaining column.
        split_tiles: tiles of an item of a remaining column; the last one may have fewer.
    """

    columns: int
    whole: int
    splits: int
    split_tiles: int

    @property
    def items(self) -> int:
        """Number of items of the launch."""
        return self.whole + (self.columns - self.whole) * self.splits


@functools.cache
def make_column_strips(columns: int, tiles: int, programs: int) -> ColumnStrips:
    """Share columns of tiles among programs so that all finish at nearly the same time.

    Long strips start less often. The columns beyond the last full round are split so that their items end together.

    Args:
        columns: number of columns of tiles of all layers.
        tiles: tiles of a column.
        programs: programs that run at a time.
    """
    whole = columns // programs * programs
    rest = columns - whole
    if not rest:
        return ColumnStrips(columns, whole, 1, tiles)
    best = (float("inf"), 1, tiles)
    for splits in range(1, tiles + 1):
        split_tiles = -(-tiles // splits)
        if (splits - 1) * split_tiles < tiles:
            best = min(best, (-(-rest * splits // programs) * (split_tiles + STRIP_TILES), splits, split_tiles))
    return ColumnStrips(columns, whole, best[1], best[2])


# Functions that the kernels share


@triton.jit
def dot_bf16_splits(
    left_high,
    left_middle,
    left_low,
    right_high,
    right_middle,
    right_low,
    accumulator,
    BF16_SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return accumulator + left @ right of two split operands: three or six products, the smallest first."""
    if BF16_SPLITS == 3:
        accumulator = dot(left_high, right_low, accumulator, INTERPRETED)
        accumulator = dot(left_low, right_high, accumulator, INTERPRETED)
        accumulator = dot(left_middle, right_middle, accumulator, INTERPRETED)
    accumulator = dot(left_high, right_middle, accumulator, INTERPRETED)
    accumulator = dot(left_middle, right_high, accumulator, INTERPRETED)
    return dot(left_high, right_high, accumulator, INTERPRETED)


@triton.jit
def _factor_tile(
    factor, first, last, stride, rank, rank_stride, SIZE: tl.constexpr, RANK: tl.constexpr, OFFSETS: tl.constexpr
):
    """Load [SIZE, RANK] of a factor, one row for each row or column of the weight; 0 outside."""
    index = tl.cast(first + tl.arange(0, SIZE), OFFSETS)[:, None]
    ranks = tl.cast(tl.arange(0, RANK), OFFSETS)[None, :]
    return tl.load(factor + (index * stride + ranks * rank_stride), mask=(index < last) & (ranks < rank), other=0.0)


@triton.jit
def _split_factor_tiles(
    factor,
    first,
    last,
    rank,
    term_rank,
    BF16_SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Load [SIZE, RANK] of the high, middle and low terms that split_factors wrote; 0 from row `last` on.

    With two splits, middle takes the place of low.
    """
    index = tl.arange(0, SIZE)[:, None]
    inside = index < last - first
    stride = BF16_SPLITS * term_rank
    offsets = index * tl.cast(stride, OFFSETS) + tl.arange(0, RANK)[None, :]
    high = factor + tl.cast(first, tl.int64) * stride + rank + offsets
    middle = high + term_rank
    high_tile = tl.load(high, mask=inside, other=0.0)
    middle_tile = tl.load(middle, mask=inside, other=0.0)
    if BF16_SPLITS == 3:
        return high_tile, middle_tile, tl.load(middle + term_rank, mask=inside, other=0.0)
    else:
        return high_tile, middle_tile, middle_tile


@triton.jit
def _weight_tile(
    weight, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OFFSETS: tl.constexpr
):
    """Pointers to a tile of a weight, and the mask of its elements that exist."""
    tile_row = tl.arange(0, ROWS)[:, None]
    tile_column = tl.arange(0, COLUMNS)[None, :]
    # The first row needs 64 bits. The offsets from it have the type OFFSETS.
    first = weight + tl.cast(row, tl.int64) * stride + column
    pointers = first + (tile_row * tl.cast(stride, OFFSETS) + tile_column)
    return pointers, (tile_row < rows - row) & (tile_column < columns - column)


@triton.jit
def _strip_of_item(item, whole, splits, split_rows, rows):
    """Column strip of an item, its first row and the end of its rows; ColumnStrips describes the items."""
    beyond = tl.maximum(item - whole, 0)
    first_row = beyond % splits * split_rows
    strip = tl.where(item < whole, item, whole + beyond // splits)
    return strip, first_row, tl.where(item < whole, rows, tl.minimum(first_row + split_rows, rows))


@triton.jit
def _rounded_tile(
    exact,
    row,
    column,
    columns,
    seed,
    layer_index,
    TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Round a float32 tile to the weight's type, once."""
    ROWS: tl.constexpr = exact.shape[0]
    COLUMNS: tl.constexpr = exact.shape[1]
    if STOCHASTIC:
        eighths = column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
        first = (row + tl.arange(0, ROWS)[:, None]) * tl.cdiv(columns, 8) + eighths
        exact = round_stochastic(exact, random_bits(seed, first, layer_index, ROWS, COLUMNS), TYPE)
    if tl.bfloat16 == TYPE:
        return to_bfloat16(exact, INTERPRETED)
    else:
        return exact.to(TYPE)


# Kernel of the kind resident


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
    INTERPRETED: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
):
    """Persistent kernel for ranks up to RANK. An item is a column strip; _Layers describes the table."""
    tile_columns = tl.cdiv(columns, COLUMNS)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        strip, first_row, last_row = _strip_of_item(item, whole, splits, split_rows, rows)
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

        own_right = _factor_tile(
            right, column, width, right_column_stride, rank, right_rank_stride, COLUMNS, RANK, OFFSETS
        )  # [COLUMNS, RANK]
        high, middle, low = split_bf16(own_right, BF16_SPLITS, INTERPRETED)
        for row in tl.range(first_row, last_row, ROWS, num_stages=STAGES):
            pointers, mask = _weight_tile(weight, row, column, last_row, width, stride, ROWS, COLUMNS, OFFSETS)
            old = tl.load(pointers, mask=mask, other=0.0)
            own_left = _factor_tile(left, row, last_row, left_row_stride, rank, left_rank_stride, ROWS, RANK, OFFSETS)
            left_high, left_middle, left_low = split_bf16(own_left, BF16_SPLITS, INTERPRETED)
            product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            product = dot_bf16_splits(
                left_high, left_middle, left_low, high.T, middle.T, low.T, product, BF16_SPLITS, INTERPRETED
            )
            exact = old.to(tl.float32) + scale * product
            new = _rounded_tile(exact, row, column, columns, seed, layer_index, TYPE, STOCHASTIC, INTERPRETED)
            if KEEP_ZEROS:
                new = tl.where(old.to(tl.float32) == 0.0, old, new)
            tl.store(pointers, new, mask=mask)


# Kernel of the kind column_strips


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
    INTERPRETED: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
):
    """Persistent kernel for ranks up to RANK. lefts is what split_factors wrote, [layers * rows, 2 * RANK].

    The terms of right stay in shared memory: reading them again for every tile would keep the L2 cache busier than
    the tensor cores. Sums and rounding keep the layout of the products, so threads exchange nothing.
    """
    tile_columns = tl.cdiv(columns, COLUMNS)
    left = tl.make_tensor_descriptor(lefts, [layers * rows, 2 * RANK], [2 * RANK, 1], [ROWS, RANK])
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        strip, first_row, last_row = _strip_of_item(item, whole, splits, split_rows, rows)
        layer = strip // tile_columns
        column = strip % tile_columns * COLUMNS
        address = tl.load(table + layer).to(tl.pointer_type(TYPE))
        factor = tl.load(table + 2 * layers + layer).to(tl.pointer_type(tl.float32))
        right = tl.make_tensor_descriptor(
            factor, [rank, columns], [tl.cast(right_stride, tl.int64), 1], [RANK, COLUMNS]
        )
        stride = tl.cast(weight_stride, tl.int64)
        weight = tl.make_tensor_descriptor(address, [rows, columns], [stride, 1], [ROWS, COLUMNS])
        high, middle, low = split_bf16(right.load([0, column]), 2, INTERPRETED)
        for row in tl.range(first_row, last_row, ROWS, num_stages=STAGES):
            # Rows of left beyond the last row of a layer belong to the next layer; their results are not stored.
            left_high = left.load([layer * rows + row, 0])
            left_middle = left.load([layer * rows + row, RANK])
            old = weight.load([row, column])
            product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            product = dot_bf16_splits(left_high, left_middle, left_middle, high, middle, low, product, 2, INTERPRETED)
            exact = old.to(tl.float32) + scale * product
            new = _rounded_tile(exact, row, column, columns, 0, 0, TYPE, False, INTERPRETED)
            if KEEP_ZEROS:
                new = tl.where(old.to(tl.float32) == 0.0, old, new)
            weight.store([row, column], new)


# Kernels of the kind bf16_splits; column_strips uses split_factors too


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
    INTERPRETED: tl.constexpr,
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
        rounded = to_bfloat16(value, INTERPRETED)
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
    INTERPRETED: tl.constexpr,
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
        pointers, mask = _weight_tile(weight, row, column, rows, width, weight_row_stride, ROWS, COLUMNS, OFFSETS)
        old = tl.load(pointers, mask=mask, other=0.0)
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in tl.range(0, term_rank, RANK, num_stages=STAGES):
            left_high, left_middle, left_low = _split_factor_tiles(
                left, row, rows, step, term_rank, BF16_SPLITS, ROWS, RANK, OFFSETS
            )  # [ROWS, RANK]
            high, middle, low = _split_factor_tiles(
                right, column, columns, step, term_rank, BF16_SPLITS, COLUMNS, RANK, OFFSETS
            )  # [COLUMNS, RANK]
            start = tl.zeros((ROWS, COLUMNS), dtype=tl.float32) if BF16_SPLITS == 3 else product
            of_step = dot_bf16_splits(
                left_high, left_middle, left_low, high.T, middle.T, low.T, start, BF16_SPLITS, INTERPRETED
            )
            # For float32 weights, tensor cores would lose too much of a sum over a long rank.
            product = product + opaque(of_step, INTERPRETED) if BF16_SPLITS == 3 else of_step
        exact = old.to(tl.float32) + scale * product
        new = _rounded_tile(exact, row, column, columns, seed, layer_index, TYPE, STOCHASTIC, INTERPRETED)
        if KEEP_ZEROS:
            new = tl.where(old.to(tl.float32) == 0.0, old, new)
        tl.store(pointers, new, mask=mask)


# Launch


@dataclass(frozen=True)
class _Layers:
    """Layers of one shape, dtype and layout, which one launch serves.

    Attributes:
        weights: with unit stride along a row. A transposed weight is given as its transpose, with swapped factors.
        lefts, rights: the factors of each weight.
        table: addresses of weights, of lefts and of rights, then the indices of the layers, int64, on the device.
        aligned: all addresses and all rows of the weights start at multiples of 16 bytes, and rows are whole.
        keep_zeros: elements that are zero keep their bits.
    """

    weights: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    table: Tensor
    aligned: bool
    keep_zeros: bool


class LowRankPlan:
    """An update whose tables are on the device: make it before the capture of a CUDA graph, run it inside."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        config: LowRankConfig | None = None,
        keep_zeros: bool = False,
    ) -> None:
        """Group the layers by launch and copy their addresses to the device.

        Args:
            weights: as for update_low_rank. The plan keeps weights and factors, and reads them when it runs.
            lefts: as for update_low_rank.
            rights: as for update_low_rank.
            config: shape of the launches; None for the ones that choose_config names.
            keep_zeros: as for update_low_rank.

        Raises:
            ValueError: strides or dtypes that no kernel takes.
            CaptureError: a CUDA graph is being captured.
        """
        self._config = config
        alike: dict[tuple[object, ...], list[int]] = {}
        rows_first = [_rows_first(*layer) for layer in zip(weights, lefts, rights, strict=True)]
        for index, (weight, left, right) in enumerate(rows_first):
            if not weight.numel() or not left.shape[1]:
                continue
            alike.setdefault(
                (weight.shape, weight.stride(), weight.dtype, left.shape, left.stride(), right.stride()), []
            ).append(index)
        self._launches: list[_Layers] = []
        for indices in alike.values():
            weight, left, _ = rows_first[indices[0]]
            count = max(1, SPLIT_BYTES // (6 * sum(weight.shape) * left.shape[1]))
            for start in range(0, len(indices), count):
                self._launches.append(_layers(rows_first, indices[start : start + count], keep_zeros))

    def run(self, scale: float, stochastic: bool, seed: int) -> None:
        """Add scale * left @ right to every weight, rounded stochastically (16-bit weights only) or to nearest."""
        launch = {
            "resident": _launch_resident,
            "column_strips": _launch_column_strips,
            "bf16_splits": _launch_bf16_splits,
        }
        for layers in self._launches:
            weight, rank = layers.weights[0], layers.lefts[0].shape[1]
            layers_stochastic = stochastic and weight.dtype != torch.float32
            rank_stride, column_stride = layers.rights[0].stride()
            tma = layers.aligned and column_stride == 1 and rank_stride % 4 == 0 and not layers_stochastic
            config = self._config or CONFIGS[choose_config(capability(weight.device), weight.dtype, rank, tma)]
            launch[config.kind](layers, config, scale, layers_stochastic, seed)


def update_low_rank(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float = 1.0,
    stochastic: bool = False,
    seed: int = 0,
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight, in place, in float32 with one rounding.

    Args:
        weights: matrices (d_out, d_in), bfloat16, float16 or float32, with a stride of 1 in either dimension.
        lefts: one (d_out, n) for each weight, float32.
        rights: one (n, d_in) for each weight, float32.
        scale: factor of the update.
        stochastic: round 16-bit weights stochastically, which keeps the expectation, not to nearest even.
        seed: of stochastic rounding, 0 to 2**63 - 1.
        keep_zeros: leave elements of a weight that are zero as they are, their signs too.

    Raises:
        ValueError: strides or dtypes that no kernel takes.
        CaptureError: a CUDA graph is being captured.
    """
    LowRankPlan(weights, lefts, rights, keep_zeros=keep_zeros).run(scale, stochastic, seed)


def _rows_first(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the update, or its transpose where the weight is transposed, so that a row has unit stride."""
    if left.dtype != torch.float32 or right.dtype != torch.float32:
        raise ValueError(f"Factors must be float32, but are {left.dtype} and {right.dtype}.")
    if weight.stride(0) == 1 < weight.stride(1):
        weight, left, right = weight.T, right.T, left.T
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"A weight has the strides {weight.stride()}, but one of them must be 1.")
    return weight, left, right


def _layers(rows_first: Sequence[tuple[Tensor, Tensor, Tensor]], indices: Sequence[int], keep_zeros: bool) -> _Layers:
    weights, lefts, rights = ([rows_first[index][operand] for index in indices] for operand in range(3))
    on_16_bytes = all(tensor.data_ptr() % 16 == 0 for tensor in (*weights, *lefts, *rights))
    aligned = on_16_bytes and weights[0].stride(0) % 8 == 0 and weights[0].shape[1] % 8 == 0
    return _Layers(weights, lefts, rights, address_table([weights, lefts, rights], indices), aligned, keep_zeros)


def _shape(layers: _Layers, config: LowRankConfig) -> dict[str, object]:
    """Compile-time arguments of all kernels."""
    return {
        "TYPE": TYPES[layers.weights[0].dtype],
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "RANK": config.rank,
        "STAGES": config.stages,
        "INTERPRETED": not layers.weights[0].is_cuda,
        "KEEP_ZEROS": layers.keep_zeros,
        "num_warps": config.warps,
    }


def _options(layers: _Layers, config: LowRankConfig, stochastic: bool) -> dict[str, object]:
    """Compile-time arguments of the kernels that take any layout."""
    return _shape(layers, config) | {
        "ALIGNED": layers.aligned,
        "STOCHASTIC": stochastic,
        "BF16_SPLITS": config.bf16_splits,
    }


def _column_strips(layers: _Layers, config: LowRankConfig, programs: int) -> ColumnStrips:
    rows, columns = layers.weights[0].shape
    return make_column_strips(len(layers.weights) * -(-columns // config.columns), -(-rows // config.rows), programs)


def _launch_resident(layers: _Layers, config: LowRankConfig, scale: float, stochastic: bool, seed: int) -> None:
    weight, left, right = layers.weights[0], layers.lefts[0], layers.rights[0]
    programs_each = resident_programs(capability(weight.device), config, stochastic)
    programs = programs_each * multiprocessors(weight.device)
    strips = _column_strips(layers, config, programs)
    add_low_rank_resident[(min(strips.items, programs),)](
        layers.table,
        len(layers.weights),
        *weight.shape,
        left.shape[1],
        weight.stride(0),
        *left.stride(),
        *right.stride(),
        scale,
        seed,
        strips.whole,
        strips.splits,
        strips.split_tiles * config.rows,
        strips.items,
        OFFSETS=offset_type(config.rows * weight.stride(0), _extent(left), _extent(right)),
        maxnreg=max_registers(programs_each, config.warps),
        **_options(layers, config, stochastic),
    )


def _launch_column_strips(layers: _Layers, config: LowRankConfig, scale: float, stochastic: bool, seed: int) -> None:
    weight, left, right = layers.weights[0], layers.lefts[0], layers.rights[0]
    count, device = len(layers.weights), weight.device
    lefts = _split_factors(layers.table[count:], left, count, config)
    programs = config.programs * multiprocessors(device)
    strips = _column_strips(layers, config, programs)
    run_with_scratch(
        device,
        lambda: add_low_rank_column_strips[(min(strips.items, programs),)](
            layers.table,
            lefts,
            count,
            *weight.shape,
            left.shape[1],
            weight.stride(0),
            right.stride(0),
            scale,
            strips.whole,
            strips.splits,
            strips.split_tiles * config.rows,
            strips.items,
            **_shape(layers, config),
        ),
    )


def _launch_bf16_splits(layers: _Layers, config: LowRankConfig, scale: float, stochastic: bool, seed: int) -> None:
    weight = layers.weights[0]
    count = len(layers.weights)
    lefts = _split_factors(layers.table[count:], layers.lefts[0], count, config)
    rights = _split_factors(layers.table[2 * count :], layers.rights[0].T, count, config)
    items = count * -(-weight.shape[0] // config.rows) * -(-weight.shape[1] // config.columns)
    add_low_rank_bf16_splits[(min(items, multiprocessors(weight.device)),)](
        layers.table,
        lefts,
        rights,
        count,
        *weight.shape,
        lefts.shape[2] // config.bf16_splits,
        weight.stride(0),
        scale,
        seed,
        items,
        OFFSETS=offset_type(config.rows * weight.stride(0), max(config.rows, config.columns) * lefts.shape[2]),
        **_options(layers, config, stochastic),
    )


def _extent(matrix: Tensor) -> int:
    """Distance from the first to the last element of a matrix, in elements."""
    return sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))


def _split_factors(table: Tensor, factor: Tensor, count: int, config: LowRankConfig) -> Tensor:
    """Split the factors at the head of table into (count, size, bf16_splits * rank), bfloat16; rank is rounded up."""
    size, rank = factor.shape
    term_rank = -(-rank // config.rank) * config.rank
    terms = factor.new_empty((count, size, config.bf16_splits * term_rank), dtype=torch.bfloat16)
    split_factors[(-(-size // 64), -(-term_rank // 64), count)](
        table,
        terms,
        size,
        rank,
        term_rank,
        *factor.stride(),
        BF16_SPLITS=config.bf16_splits,
        SIZE=64,
        RANK=64,
        INTERPRETED=not factor.is_cuda,
        num_warps=4,
    )
    return terms
