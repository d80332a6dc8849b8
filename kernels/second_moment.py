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

Two kernels do this: one moves operands and results through tensor memory access (second_moment_tma.py; compute
capability 9 and 10), the other through pointers (second_moment_pointers.py; earlier chips, and addresses or strides
that TMA cannot read). This file launches them.

Float32 keys are first split into bfloat16 terms (second_moment_terms.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from rocr_kernels._common import (
    Schedule,
    address_table,
    backend_of,
    capability,
    make_schedule,
    multiprocessors,
    offset_type,
    register_limit,
    run_with_scratch,
    steps_ahead,
)
from rocr_kernels.second_moment_configs import CONFIGS, Fits, SecondMomentConfig, choose_config
from rocr_kernels.second_moment_pointers import add_second_moments_pointers
from rocr_kernels.second_moment_terms import split_into_terms
from rocr_kernels.second_moment_tiles import add_slices
from rocr_kernels.second_moment_tma import add_second_moments_tma
from torch import Tensor

CHUNK_TOKENS = 8192
"""Most tokens of one accumulator."""

SPLIT_BYTES = 1 << 30
"""Most memory for the terms of float32 keys; more keys take several launches."""

SLICE_ROWS = 16
"""Rows of a tile that one program of add_slices adds."""

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


def _launch(totals: Sequence[Tensor], keys: Sequence[Tensor], products: int, config: SecondMomentConfig | None) -> None:
    """Launch the items of all layers, then add up the slices of the tiles that items share.

    keys are (tokens, width) where products is 1, and what split_into_terms returns where it is 6.
    """
    table = address_table([keys, totals])
    device, width = totals[0].device, totals[0].shape[0]
    backend = backend_of(device)
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
            BACKEND=backend,
            num_warps=config.warps,
            num_stages=steps_ahead(backend, config.stages),
            **({} if config.specialized else register_limit(backend, config.programs, config.warps)),
            **(
                {"ONE_LAYER": len(keys) == 1, "SPECIALIZED": config.specialized}
                if config.tma
                else {"ALIGNED": fits.aligned}
            ),
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
