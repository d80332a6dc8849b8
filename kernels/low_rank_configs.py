"""The configurations of the Triton kernels of low-rank updates, which of them a launch takes, and its column strips."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from rocr_kernels._common import has_small_shared_memory

STRIP_TILES = 4
"""Estimated cost of starting a column strip (its addresses and its part of right), in tiles of a weight."""


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
        if rank <= 128 and tma and not suffix and compute_capability[0] in (9, 10):
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
