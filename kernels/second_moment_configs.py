"""The configurations of the Triton kernels of second moments, and which of them a launch takes."""

from __future__ import annotations

from dataclasses import dataclass


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
        specialized: some warps copy keys and start products while the others wait for the sums (compute capability 10).
    """

    tma: bool
    rows: int
    columns: int
    step: int
    group: int
    warps: int
    stages: int
    programs: int
    specialized: bool = False


CONFIGS = {
    "tma_wide": SecondMomentConfig(True, 128, 256, 64, group=8, warps=8, stages=4, programs=1),
    "tma_small": SecondMomentConfig(True, 128, 128, 64, group=8, warps=8, stages=3, programs=2),
    "tma_specialized": SecondMomentConfig(True, 128, 128, 64, 8, warps=8, stages=4, programs=1, specialized=True),
    "tma_bf16_splits": SecondMomentConfig(True, 128, 128, 64, group=8, warps=8, stages=3, programs=1),
    "pointers": SecondMomentConfig(False, 128, 128, 32, group=16, warps=8, stages=4, programs=1),
    "pointers_small": SecondMomentConfig(False, 64, 128, 32, group=16, warps=8, stages=4, programs=1),
    "pointers_bf16_splits": SecondMomentConfig(False, 64, 128, 64, group=16, warps=8, stages=3, programs=1),
}
"""All configurations. Nothing is tuned at run time, because a trial launch would add to the totals.

choose_config never names tma_specialized: it is compiled for compute capability 10, but was never timed.
"""

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
