"""Second moments in Triton: totals += keysᵀ keys for several layers in one launch, lower triangle only.

A tile of a total is one work item, or several that share its tokens where tiles are too few to fill the chip
(schedule.py). An item adds its accumulator to memory after at most CHUNK_TOKENS tokens, since tensor cores truncate
their sums. No two items add to the same memory, so the same operands give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from rocr_kernels.bits import to_bfloat16
from rocr_kernels.launch import (
    address_table,
    capability,
    offset_type,
    processors,
    registers,
    run_with_scratch,
)
from rocr_kernels.schedule import Schedule, make_schedule
from rocr_kernels.second_moment_pointers import add_second_moments_pointers
from rocr_kernels.second_moment_tma import add_second_moments_tma
from rocr_kernels.triangle import tile_position
from torch import Tensor

CHUNK_TOKENS = 8192
"""Most tokens that one accumulator holds."""

PART_STEP = 64
"""Tokens that a part of float32 keys is a multiple of: no step of a configuration reaches into the next part."""

PART_BYTES = 1 << 30
"""Most memory for the parts that float32 keys are taken apart into; more keys go in several launches."""

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class SecondMomentConfig:
    """Shape of a launch.

    Attributes:
        tma: operands through TMA (sm_90 and later), not plain pointers.
        rows, columns: of a tile; columns is rows or twice rows.
        step: tokens that are multiplied at a time.
        group: block rows walked together.
        warps, stages: warps of a program, and steps that are loaded ahead.
        programs: on one multiprocessor.
    """

    tma: bool
    rows: int
    columns: int
    step: int
    group: int
    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class Fits:
    """What the addresses and strides of keys and totals allow.

    Attributes:
        tma: bases and rows lie at multiples of 16 bytes.
        aligned: and a row of keys is a whole number of 16 bytes, so that it can be read in such steps.
    """

    tma: bool
    aligned: bool


CONFIGS = {
    "tma_wide": SecondMomentConfig(True, 128, 256, 64, group=8, warps=8, stages=4, programs=1),
    "tma_small": SecondMomentConfig(True, 128, 128, 64, group=8, warps=8, stages=3, programs=2),
    "tma_parts": SecondMomentConfig(True, 128, 128, 64, group=8, warps=8, stages=3, programs=1),
    "pointers": SecondMomentConfig(False, 128, 128, 32, group=16, warps=8, stages=4, programs=1),
    "pointers_small": SecondMomentConfig(False, 64, 128, 32, group=16, warps=8, stages=4, programs=1),
    "pointers_parts": SecondMomentConfig(False, 64, 128, 64, group=16, warps=8, stages=3, programs=1),
}
"""Every configuration that ships; nothing is tuned at run time, since a trial launch would add to the totals."""

WIDE_FROM = 1024
"""Width from which the wide tile pays in spite of what it wastes on the diagonal; an estimate."""


def choose_config(compute_capability: tuple[int, int], products: int, width: int, fits: Fits) -> str:
    """Name the configuration for a chip, for the products of key parts, the width, and the memory of the keys."""
    if compute_capability[0] in (9, 10) and fits.tma:
        if products > 1:
            return "tma_parts"
        return "tma_wide" if width >= WIDE_FROM else "tma_small"
    if products > 1:
        return "pointers_parts"
    return "pointers" if fits.aligned else "pointers_small"


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
    BAND: tl.constexpr,
):
    """Add the slices of one tile to its total, the first slice first; one program for every BAND rows."""
    first_slice = tl.program_id(0) * splits
    layer, row, column = tile_position(whole + tl.program_id(0), width, ROWS, COLUMNS, GROUP)
    band = tl.program_id(1) * BAND + tl.arange(0, BAND)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    lower = (row + band >= column + columns) & (row + band < width)
    source = slices + first_slice.to(tl.int64) * (ROWS * COLUMNS) + band * COLUMNS + columns
    total = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
    target = total + (row + band).to(tl.int64) * total_stride + column + columns
    value = tl.zeros((BAND, COLUMNS), dtype=tl.float32)
    for split in tl.range(0, splits):
        value += tl.load(source + tl.cast(split, tl.int64) * (ROWS * COLUMNS), mask=lower, other=0.0)
    tl.store(target, tl.load(target, mask=lower, other=0.0) + value, mask=lower)


@triton.jit
def split_keys(
    table,
    parts,
    tokens,
    part_tokens,
    width,
    key_stride,
    part_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write float32 keys as a sum of three bfloat16 parts: for each layer all high, all middle, all low parts."""
    layer = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(part_stride, COLUMNS)
    token = (tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    keys = tl.load(table + layer).to(tl.pointer_type(tl.float32))
    value = tl.load(keys + token * key_stride + column, mask=(column < width) & (token < tokens), other=0.0)
    for part in tl.static_range(3):
        rounded = to_bfloat16(value, INTERPRETED)
        value -= rounded.to(tl.float32)
        target = parts + ((3 * layer + part) * part_tokens + token) * part_stride + column
        tl.store(target, rounded, mask=(column < part_stride) & (token < part_tokens))


def accumulate_second_moments(
    totals: Sequence[Tensor], keys: Sequence[Tensor], config: SecondMomentConfig | None = None
) -> None:
    """Add keysᵀ keys to the lower triangle of each total, in place.

    Args:
        totals: for each layer (d, d), float32, unit stride along a row, all of one shape and stride.
        keys: for each layer (t, d), bfloat16, float16 or float32, unit stride along a row, all of one shape, stride
            and dtype, with t and d at least 1.
        config: None for the one that choose_config names.

    Raises:
        ValueError: layers that differ, or strides that no kernel reads.
    """
    _require_alike("totals", totals)
    _require_alike("keys", keys)
    if keys[0].dtype == torch.float32:
        block_tokens = max(
            CHUNK_TOKENS, PART_BYTES // (6 * len(keys) * keys[0].shape[1]) // CHUNK_TOKENS * CHUNK_TOKENS
        )
        for start in range(0, keys[0].shape[0], block_tokens):
            block = [each[start : start + block_tokens] for each in keys]
            _launch(totals, _in_parts(block), products=6, config=config)
    else:
        _launch(totals, keys, products=1, config=config)


def _require_alike(name: str, tensors: Sequence[Tensor]) -> None:
    first = tensors[0]
    for tensor in tensors:
        if (tensor.shape, tensor.stride(), tensor.dtype) != (first.shape, first.stride(), first.dtype):
            raise ValueError(f"{name} of one launch must have one shape, stride and dtype.")
    if first.shape[1] > 1 and first.stride(1) != 1:
        raise ValueError(f"{name} must have unit stride along a row, but the strides are {first.stride()}.")


def _in_parts(keys: Sequence[Tensor]) -> list[Tensor]:
    """Take float32 keys apart into (3 * tokens, width) bfloat16, tokens and width rounded up for the kernels."""
    table = address_table([keys])
    tokens, width = keys[0].shape
    part_tokens = -(-tokens // PART_STEP) * PART_STEP
    part_width = -(-width // 8) * 8
    parts = keys[0].new_empty((len(keys), 3 * part_tokens, part_width), dtype=torch.bfloat16)
    split_keys[(-(-part_tokens // 64) * -(-part_width // 128), len(keys))](
        table,
        parts,
        tokens,
        part_tokens,
        width,
        keys[0].stride(0),
        part_width,
        TOKENS=64,
        COLUMNS=128,
        INTERPRETED=not parts.is_cuda,
        num_warps=8,
    )
    return list(parts)


def _launch(totals: Sequence[Tensor], keys: Sequence[Tensor], products: int, config: SecondMomentConfig | None) -> None:
    """Launch the items of all layers, then add up the slices of the tiles that were shared.

    Keys are (t, d) where products is 1, and what _in_parts returns where it is 6.
    """
    table = address_table([keys, totals])
    device, width = totals[0].device, totals[0].shape[0]
    fits = _fits(totals, keys)
    config = config or CONFIGS[choose_config(capability(device), products, width, fits)]
    part_tokens = keys[0].shape[0] // 3 if products == 6 else keys[0].shape[0]
    schedule = _schedule(config, len(keys), width, products * part_tokens, device)
    slices = torch.zeros(max(1, schedule.slices) * config.rows * config.columns, device=device)
    kernel = add_second_moments_tma if config.tma else add_second_moments_pointers
    programs = min(schedule.items, processors(device) * config.programs)
    run_with_scratch(
        device,
        lambda: kernel[(programs,)](
            table,
            slices,
            len(keys),
            products * part_tokens,
            part_tokens,
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
            maxnreg=registers(config.programs, config.warps),
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
    return make_schedule(tiles, tokens, processors(device) * config.programs, config.step)


def _add_slices(
    table: Tensor, slices: Tensor, totals: Sequence[Tensor], schedule: Schedule, config: SecondMomentConfig
) -> None:
    band = 16
    add_slices[(schedule.tiles - schedule.whole, config.rows // band)](
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
        BAND=band,
        num_warps=4,
    )
