"""The operations through the Triton kernels of kernels/ (rocr_kernels), for NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import torch
from torch import Tensor

OLDEST_TRITON = (3, 6)
"""The first version that the kernels are compiled with in the tests."""


def is_available(device: torch.device) -> bool:
    """Whether a recent Triton is installed, and the device is an NVIDIA GPU of compute capability 8.0 or more."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    try:
        version = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    is_recent = (int(version[0]), int(version[1])) >= OLDEST_TRITON
    return is_recent and torch.cuda.get_device_capability(device) >= (8, 0)


def accumulate_second_moment(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the lower triangle of total."""
    accumulate_second_moments([total], [keys])


def accumulate_second_moments(totals: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """Add keysᵀ keys to the lower triangle of each total, alike layers in one launch."""
    rows = [_with_rows(total) for total in totals]
    second_moments_op(rows, list(keys))
    for total, updated in zip(totals, rows, strict=True):
        if updated is not total:
            total.copy_(updated)


def low_rank_update(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float,
    rounding: str,
    seed: int,
) -> None:
    """Add scale * left @ right to every weight, alike layers in one launch."""
    rows = [weight if weight.stride(0) == 1 else _with_rows(weight) for weight in weights]
    low_rank_update_op(rows, list(lefts), list(rights), scale, rounding == "stochastic", seed)
    for weight, updated in zip(weights, rows, strict=True):
        if updated is not weight:
            weight.copy_(updated)


def _with_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@torch.library.custom_op("rocr::triton_second_moments", mutates_args=("totals",))
def second_moments_op(totals: list[Tensor], keys: list[Tensor]) -> None:
    """Add keysᵀ keys to the lower triangle of each total; totals and keys have unit stride along a row."""
    from rocr_kernels.second_moment import accumulate_second_moments

    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (total, each) in enumerate(zip(totals, keys, strict=True)):
        layout = (total.stride(), each.shape, each.stride(), each.dtype)
        alike.setdefault(layout, []).append(index)
    with torch.cuda.device(totals[0].get_device()):
        for indices in alike.values():
            accumulate_second_moments([totals[index] for index in indices], [keys[index] for index in indices])


@torch.library.custom_op("rocr::triton_low_rank_update", mutates_args=("weights",))
def low_rank_update_op(
    weights: list[Tensor], lefts: list[Tensor], rights: list[Tensor], scale: float, at_random: bool, seed: int
) -> None:
    """Add scale * left @ right to every weight; a weight has unit stride along its rows or its columns."""
    from rocr_kernels.low_rank_update import update_low_rank

    with torch.cuda.device(weights[0].get_device()):
        update_low_rank(weights, lefts, rights, scale, at_random, seed)


@second_moments_op.register_fake
def _(totals: list[Tensor], keys: list[Tensor]) -> None:
    return None


@low_rank_update_op.register_fake
def _(
    weights: list[Tensor], lefts: list[Tensor], rights: list[Tensor], scale: float, at_random: bool, seed: int
) -> None:
    return None
