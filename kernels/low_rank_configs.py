"""The shapes in which low-rank updates are launched, and which of them fits a chip, a dtype and a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rocr_kernels.launch import has_small_memory


@dataclass(frozen=True)
class LowRankConfig:
    """Shape of a launch.

    Attributes:
        kind: "resident": right stays with its program (low_rank_tiles); "bands": so it does, and the rest comes
            through TMA (low_rank_bands); "parts": both factors are split first (low_rank_parts).
        parts: bfloat16 parts of a factor.
        rows, columns: of a tile.
        rank: the largest rank of a launch, or the step of the rank loop where the kind is "parts".
        warps, stages: warps of a program, and steps that are loaded ahead.
        programs: on one multiprocessor, as many as its registers are for.
    """

    kind: str
    parts: int
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
    "bands_64": LowRankConfig("bands", 2, 64, 128, rank=64, warps=4, stages=3, programs=1),
    "bands_128": LowRankConfig("bands", 2, 64, 128, rank=128, warps=4, stages=3, programs=1),
    "parts": LowRankConfig("parts", 2, 128, 128, rank=32, warps=8, stages=3, programs=1),
    "parts_float32": LowRankConfig("parts", 3, 128, 64, rank=32, warps=8, stages=3, programs=1),
}
"""Every configuration that ships; nothing is tuned at run time, since a trial launch would change the weights."""


def choose_config(compute_capability: tuple[int, int], dtype: torch.dtype, rank: int, streams: bool) -> str:
    """Name the configuration for a chip, the dtype of the weights and the rank.

    streams: TMA can move the weights, and they are rounded to nearest, for which no thread needs another's numbers.
    """
    suffix = "_float32" if dtype == torch.float32 else ""
    if rank > 32 or (suffix and has_small_memory(compute_capability)):
        if rank <= 128 and streams and not suffix and compute_capability[0] == 9:
            return f"bands_{64 if rank <= 64 else 128}"
        return "parts" + suffix
    return f"resident_{16 if rank <= 16 else 32}{suffix}"


def resident_programs(compute_capability: tuple[int, int], config: LowRankConfig, at_random: bool) -> int:
    """Programs of a resident launch on one multiprocessor: one waits for its tile while another multiplies.

    Fewer where random bits take registers, or a consumer chip has 100 KiB of shared memory.
    """
    return min(2, config.programs) if at_random or has_small_memory(compute_capability) else config.programs
