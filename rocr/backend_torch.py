"""The operations in plain torch: for any device, and for a machine without a compiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rocr.rounding import round_into

MAXIMUM_TOKENS = 8192
"""Tokens that one float32 accumulator may hold before it is added to the total."""

PANEL_ROWS = 384
"""Rows of the lower triangle that one product fills: a compromise of wasted squares and small products."""

BLOCK_ELEMENTS = 1 << 24
"""Elements of a weight that are held in float32 at a time (64 MiB)."""


def is_available(device: torch.device) -> bool:
    """Whether this backend runs on the device: always."""
    return True


def accumulate_second_moment(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the lower triangle of total, panel by panel, with float32 products."""
    for first in range(0, keys.shape[0], MAXIMUM_TOKENS):
        tokens = keys[first : first + MAXIMUM_TOKENS].float()
        for start in range(0, total.shape[0], PANEL_ROWS):
            rows = slice(start, min(start + PANEL_ROWS, total.shape[0]))
            panel = tokens[:, rows]
            total[rows, :start].addmm_(panel.T, tokens[:, :start])
            total[rows, rows].add_((panel.T @ panel).tril_())


def low_rank_update(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float,
    rounding: str,
    seed: int,
) -> None:
    """Add scale * left @ right to every weight in float32, rounded once, in blocks of rows."""
    generator = torch.Generator(weights[0].device).manual_seed(seed) if weights else None
    for weight, left, right in zip(weights, lefts, rights, strict=True):
        block_rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], block_rows):
            block = weight[start : start + block_rows]
            exact = torch.addmm(block.float(), left[start : start + block_rows], right, alpha=scale)
            round_into(block, exact, rounding, generator)
