"""Second moments of groups of rows in Triton: totals[e] += keysᵀ @ keys over the rows of group e, in one launch.

Formula, for keys K [tokens, width] whose rows offset[e] to offset[e + 1] belong to group e, and the total C of a group:

    C[e, i, j] += sum over t from offset[e] to offset[e + 1] of K[t, i] * K[t, j]        for j <= i

Tiles are those of second_moment_tiles.py, and every group has the same tiles. A part is a range of rows of one group;
an item is one tile of one part:

    groups     |   0    |        1        |2|   3   |      rows of keys, from left to right
    parts      |   0    |   1    |   2    |3|   4   |      a group of many rows has several parts
    items      part * tiles + tile

Parts are taken from the longest to the shortest. A group of one part adds its tiles to its total; the parts of
another group write to slices of scratch memory, which a second kernel adds to the total in order. No two items write to
the same memory: the same operands give the same bytes. Operands move through pointers, whose masks end with the rows of
a group; TMA would read rows of the next group too.

Float32 keys are first split into three bfloat16 terms (second_moment_terms.py). The sum runs over six products of
terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from rocr_kernels._common import (
    MAXIMUM_SPLITS,
    MINIMUM_SPLIT_TOKENS,
    POINTERS_ONLY,
    address_table,
    backend_of,
    multiprocessors,
    offset_type,
    register_limit,
    steps_ahead,
)
from rocr_kernels.second_moment import CHUNK_TOKENS, SLICE_ROWS, SPLIT_BYTES
from rocr_kernels.second_moment_configs import CONFIGS, Fits, SecondMomentConfig, choose_config
from rocr_kernels.second_moment_pointers import add_piece_pointers, load_keys
from rocr_kernels.second_moment_terms import LEFT_TERMS, RIGHT_TERMS, add_product, split_into_terms
from rocr_kernels.second_moment_tiles import halves, tile_position
from torch import Tensor

PART_FIELDS = tl.constexpr(4)
"""Numbers of a part in the table: group, first row, end of its rows, and its slice (negative: it adds to the total)."""

SPLIT_FIELDS = tl.constexpr(3)
"""Numbers of a group of several parts in the table: group, its first slice, and its number of slices."""


# Parts


@dataclass(frozen=True)
class Part:
    """A range of rows of one group.

    Attributes:
        group: the group.
        start, end: of the rows.
        slice_index: the slice that the part writes to, or -1 if it adds to the total.
    """

    group: int
    start: int
    end: int
    slice_index: int


@dataclass(frozen=True)
class Parts:
    """The parts of a launch.

    Attributes:
        parts: from the longest to the shortest.
        split: for each group of several parts the group, its first slice and its number of slices.
    """

    parts: list[Part]
    split: list[tuple[int, int, int]]

    @property
    def slices(self) -> int:
        """Number of slices; each has the size of all tiles of a group."""
        return sum(count for _, _, count in self.split)


def make_parts(offsets: Sequence[int], tiles: int, programs: int, token_step: int) -> Parts:
    """Split groups whose tiles would keep a program busy while the others are done.

    Args:
        offsets: first row of each group, and the end of the last one.
        tiles: number of tiles of a group.
        programs: programs that run at a time.
        token_step: rows that a program multiplies at a time; parts begin at multiples of it within a group.
    """
    # A quarter of the share of a program: then the busiest program has little more than the others.
    most = max(MINIMUM_SPLIT_TOKENS, (offsets[-1] - offsets[0]) * tiles // (4 * programs))
    parts: list[Part] = []
    split: list[tuple[int, int, int]] = []
    slices = 0
    for group, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            continue
        count = min(MAXIMUM_SPLITS, -(-(end - start) // most))
        rows = -(-(end - start) // (count * token_step)) * token_step
        starts = range(start, end, rows)
        if len(starts) == 1:
            parts.append(Part(group, start, end, -1))
            continue
        split.append((group, slices, len(starts)))
        for first in starts:
            parts.append(Part(group, first, min(first + rows, end), slices))
            slices += 1
    return Parts(sorted(parts, key=lambda part: part.start - part.end), split)


# Kernels


@triton.jit
def _add_products(
    accumulator,
    keys,
    row,
    column,
    key_stride,
    width,
    start,
    end,
    term_tokens,
    PRODUCTS: tl.constexpr,
    STEP: tl.constexpr,
    OFFSETS: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Return accumulator + left keysᵀ @ right keys over the rows from start to end, for each product of terms."""
    steps = tl.arange(0, STEP)
    left_columns = (row + tl.arange(0, accumulator.shape[0]))[:, None]
    right_columns = (column + tl.arange(0, accumulator.shape[1]))[None, :]
    count = tl.cdiv(end - start, STEP)
    for step in tl.range(0, count * PRODUCTS):
        if PRODUCTS == 1:
            token = start + step * STEP
            left_token, right_token, left_end, right_end = token, token, end, end
        else:
            product = step // count
            token = start + (step - product * count) * STEP
            left_term = ((LEFT_TERMS >> (2 * product)) & 3) * term_tokens
            right_term = ((RIGHT_TERMS >> (2 * product)) & 3) * term_tokens
            left_token, right_token = token + left_term, token + right_term
            left_end, right_end = end + left_term, end + right_term
        left_keys = load_keys(keys, left_token, steps[None, :], left_columns, key_stride, left_end, width, OFFSETS)
        right_keys = load_keys(keys, right_token, steps[:, None], right_columns, key_stride, right_end, width, OFFSETS)
        accumulator = add_product(left_keys, right_keys, accumulator, PRODUCTS > 1, BACKEND)
    return accumulator


@triton.jit
def add_grouped_second_moments(
    table,
    keys,
    totals,
    slices,
    parts,
    tiles,
    term_tokens,
    key_width,
    width,
    key_stride,
    group_stride,
    total_stride,
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
    stride = key_stride
    if ALIGNED:
        # The compiler does not know that these are multiples of 8; once it does, it loads 16 bytes at a time.
        stride = stride // 8 * 8
        key_width = key_width // 8 * 8
        keys = tl.multiple_of(keys, 16)
    for item in tl.range(tl.program_id(0), parts * tiles, tl.num_programs(0)):
        part = table + item // tiles * PART_FIELDS
        group, slice_index = tl.load(part), tl.load(part + 3)
        start, end = tl.load(part + 1).to(tl.int32), tl.load(part + 2).to(tl.int32)
        tile = item % tiles
        _, row, column = tile_position(tile, width, ROWS, COLUMNS, GROUP)
        is_slice = slice_index >= 0
        own_slice = slices.to(tl.int64) + (slice_index * tiles + tile) * (ROWS * COLUMNS * 4)
        in_total = totals.to(tl.int64) + (group * group_stride + row.to(tl.int64) * total_stride + column) * 4
        target = tl.where(is_slice, own_slice, in_total).to(tl.pointer_type(tl.float32))
        target_stride = tl.where(is_slice, COLUMNS, total_stride)

        # The lower tile of the last diagonal block may lie outside the total: it sums no tokens.
        end = tl.where(row < width, end, start)
        for chunk in tl.range(start, end, CHUNK_TOKENS):
            accumulator = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            accumulator = _add_products(
                accumulator,
                keys,
                row,
                column,
                stride,
                key_width,
                chunk,
                tl.minimum(chunk + CHUNK_TOKENS, end),
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


@triton.jit
def add_group_slices(
    table,
    totals,
    slices,
    tiles,
    width,
    group_stride,
    total_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SLICE_ROWS: tl.constexpr,
):
    """Add SLICE_ROWS rows of the slices of one tile of a group to its total, the first slice first."""
    split = table + tl.program_id(2) * SPLIT_FIELDS
    group, first_slice, count = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    tile = tl.program_id(0)
    _, row, column = tile_position(tile, width, ROWS, COLUMNS, GROUP)
    rows = tl.program_id(1) * SLICE_ROWS + tl.arange(0, SLICE_ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    lower = (row + rows >= column + columns) & (row + rows < width)
    source = slices + (first_slice * tiles + tile) * (ROWS * COLUMNS) + rows * COLUMNS + columns
    target = totals + group * group_stride + (row + rows).to(tl.int64) * total_stride + column + columns
    value = tl.zeros((SLICE_ROWS, COLUMNS), dtype=tl.float32)
    for index in tl.range(0, count):
        value += tl.load(source + tl.cast(index, tl.int64) * tiles * (ROWS * COLUMNS), mask=lower, other=0.0)
    tl.store(target, tl.load(target, mask=lower, other=0.0) + value, mask=lower)


# Launch


def accumulate_grouped_second_moment(
    totals: Tensor, keys: Tensor, offsets: Sequence[int], config: SecondMomentConfig | None = None
) -> None:
    """Add keysᵀ @ keys of each group of rows to the lower triangle of its total, in place.

    Args:
        totals: (groups, width, width), float32, with unit stride along a row.
        keys: (tokens, width), bfloat16, float16 or float32, with unit stride along a row; fewer than 2**31 tokens.
        offsets: first row of each group, and the end of the last one; ascending.
        config: shape of the launch, one without TMA; None for the one that choose_config names.

    Raises:
        ValueError: a row does not have unit stride.
        CaptureError: a CUDA graph is being captured.
    """
    for name, tensor in (("totals", totals), ("keys", keys)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have unit stride along a row, but the strides are {tensor.stride()}.")
    if keys.dtype != torch.float32:
        _launch(totals, keys, offsets, products=1, config=config)
        return
    block = max(CHUNK_TOKENS, SPLIT_BYTES // (6 * keys.shape[1]) // CHUNK_TOKENS * CHUNK_TOKENS)
    for start in range(offsets[0], offsets[-1], block):
        end = min(start + block, offsets[-1])
        inside = [min(max(offset, start), end) - start for offset in offsets]
        _launch(totals, split_into_terms([keys[start:end]])[0], inside, products=6, config=config)


def _launch(
    totals: Tensor, keys: Tensor, offsets: Sequence[int], products: int, config: SecondMomentConfig | None
) -> None:
    """Launch the items of all groups, then add up the slices of the groups that have several parts.

    keys are (tokens, width) where products is 1, and what split_into_terms returns where it is 6.
    """
    device, width = totals.device, totals.shape[1]
    backend = backend_of(device)
    aligned = keys.data_ptr() % 16 == 0 and keys.stride(0) % 8 == 0 and keys.shape[1] % 8 == 0
    config = config or CONFIGS[choose_config(POINTERS_ONLY, products, width, Fits(tma=False, aligned=aligned))]
    blocks = -(-width // config.columns)
    tiles = blocks * (blocks + 1) // 2 * (config.columns // config.rows)
    programs = multiprocessors(device) * config.programs
    parts = make_parts(offsets, tiles, programs, config.step)
    if not parts.parts:
        return
    numbers = [number for part in parts.parts for number in (part.group, part.start, part.end, part.slice_index)]
    # The addresses are not used: a table without tensors has no device.
    table = address_table([[totals]], [*numbers, *(number for group in parts.split for number in group)])[1:]
    slices = torch.zeros(max(1, parts.slices * tiles) * config.rows * config.columns, device=device)
    add_grouped_second_moments[(min(len(parts.parts) * tiles, programs),)](
        table,
        keys,
        totals,
        slices,
        len(parts.parts),
        tiles,
        keys.shape[0] // 3 if products == 6 else keys.shape[0],
        keys.shape[1],
        width,
        keys.stride(0),
        totals.stride(0),
        totals.stride(1),
        PRODUCTS=products,
        ALIGNED=aligned,
        CHUNK_TOKENS=CHUNK_TOKENS,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=config.step,
        GROUP=config.group,
        OFFSETS=offset_type(config.step * keys.stride(0), config.rows * totals.stride(1)),
        BACKEND=backend,
        num_warps=config.warps,
        num_stages=steps_ahead(backend, config.stages),
        **register_limit(backend, config.programs, config.warps),
    )
    if parts.split:
        add_group_slices[(tiles, config.rows // SLICE_ROWS, len(parts.split))](
            table[len(numbers) :],
            totals,
            slices,
            tiles,
            width,
            totals.stride(0),
            totals.stride(1),
            ROWS=config.rows,
            COLUMNS=config.columns,
            GROUP=config.group,
            SLICE_ROWS=SLICE_ROWS,
            num_warps=4,
        )
