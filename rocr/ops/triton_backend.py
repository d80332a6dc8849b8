"""The operations in the Triton kernels of kernels/ (rocr_kernels), for NVIDIA GPUs of sm_80 and later, and AMD GPUs."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.ops.direct import bypass_dispatcher
from rocr.ops.system import require_solvable
from rocr.ops.torch_backend import BLOCK_ELEMENTS
from rocr.ops.torch_backend import solve_products as solve_with_torch

OLDEST_TRITON = (3, 6)
"""The oldest version that the tests compile the kernels with."""


AMD_CHIPS = ("gfx90a", "gfx942")
"""The AMD GPUs that the tests compile the kernels for (MI200 and MI300)."""

PACKAGES = ("triton", "triton-rocm", "pytorch-triton-rocm")
"""Names under which Triton is installed; those of ROCm have changed."""


def is_available(device: torch.device) -> bool:
    """Return whether a recent Triton is installed and the device is a GPU that the kernels are compiled for.

    These are NVIDIA GPUs of compute capability 8.0 or more, and AMD_CHIPS.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or not _is_recent():
        return False
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0] in AMD_CHIPS
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _is_recent() -> bool:
    """Return whether a recent Triton is installed; cached, since reading metadata takes longer than a small launch."""
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package).split(".")
            return (int(version[0]), int(version[1])) >= OLDEST_TRITON
    return False


def accumulate_second_moment(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the lower triangle of total."""
    accumulate_second_moments([total], [keys])


def accumulate_second_moments(totals: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """Add keysᵀ keys to the lower triangle of each total; equal layouts share a launch."""
    rows = [_with_rows(total) for total in totals]
    bypass_dispatcher(second_moments_op, _add_second_moments, rows, list(keys))
    for total, updated in zip(totals, rows, strict=True):
        if updated is not total:
            total.copy_(updated)


def accumulate_grouped_second_moment(totals: Tensor, keys: Tensor, offsets: Sequence[int]) -> None:
    """Add the second moment of rows offsets[e] to offsets[e + 1] of keys to totals[e], in one launch."""
    rows = _with_rows(totals)
    bypass_dispatcher(grouped_second_moment_op, _add_grouped_second_moment, [rows], keys, list(offsets))
    if rows is not totals:
        totals.copy_(rows)


def low_rank_update(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float,
    rounding: str,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight, or where it is not zero; weights of equal layout share a launch."""
    rows = [weight if weight.stride(0) == 1 else _with_rows(weight) for weight in weights]
    rest = (list(lefts), list(rights), scale, rounding == "stochastic", seed, keep_zeros)
    bypass_dispatcher(low_rank_update_op, _update_low_rank, rows, *rest)
    for weight, updated in zip(weights, rows, strict=True):
        if updated is not weight:
            weight.copy_(updated)


def solve_on_support(weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Return the coefficients (d_out, m) of each row, some rows at a time."""
    coefficients: Tensor = solve_on_support_op(_with_rows(weight), keys, residuals.T.contiguous(), basis, ridge)
    return coefficients


def _with_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


@contextmanager
def _no_capture() -> Iterator[None]:
    """Raise the error of the kernels during the capture of a CUDA graph as an InputError."""
    from rocr_kernels._common import CaptureError

    try:
        yield
    except CaptureError as error:
        raise InputError(str(error)) from None


def _add_second_moments(totals: list[Tensor], keys: list[Tensor]) -> None:
    """Add keysᵀ keys to the lower triangle of each total; totals and keys have unit stride along a row."""
    from rocr_kernels.second_moment import accumulate_second_moments

    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (total, each) in enumerate(zip(totals, keys, strict=True)):
        layout = (total.stride(), each.shape, each.stride(), each.dtype)
        alike.setdefault(layout, []).append(index)
    with _no_capture(), torch.cuda.device(totals[0].get_device()):
        for indices in alike.values():
            accumulate_second_moments([totals[index] for index in indices], [keys[index] for index in indices])


def _add_grouped_second_moment(totals: list[Tensor], keys: Tensor, offsets: list[int]) -> None:
    """Add the second moment of each group of keys to the only element of totals; rows have unit stride."""
    from rocr_kernels.grouped_second_moment import accumulate_grouped_second_moment

    with _no_capture(), torch.cuda.device(totals[0].get_device()):
        accumulate_grouped_second_moment(totals[0], keys, offsets)


def _update_low_rank(
    weights: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    scale: float,
    stochastic: bool,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight; a weight has unit stride along its rows or its columns."""
    from rocr_kernels.low_rank_update import update_low_rank

    with _no_capture(), torch.cuda.device(weights[0].get_device()):
        update_low_rank(weights, lefts, rights, scale, stochastic, seed, keep_zeros)


def _solve_on_support(weight: Tensor, keys: Tensor, goals: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Return the coefficients of each row; goals are the residuals (d_out, n). Larger systems are solved by torch."""
    from rocr_kernels.support_solve import MAX_SIZE, products_on_support, solve_products

    coefficients = basis.new_empty(len(weight), len(basis))
    is_small = max(len(keys), len(basis)) <= MAX_SIZE
    step = max(1, BLOCK_ELEMENTS // (len(keys) * len(basis)))
    with _no_capture(), torch.cuda.device(weight.get_device()) if weight.is_cuda else nullcontext():
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            products = products_on_support(weight[rows], keys, basis)
            if is_small:
                coefficients[rows], failed = solve_products(products, goals[rows], ridge)
                require_solvable(failed.any(), ridge)
            else:
                coefficients[rows] = solve_with_torch(products, goals[rows], ridge)
    return coefficients


# torch.compile then leaves them out of its CUDA graphs; older versions of torch have no such tag.
_OUTSIDE_GRAPHS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)

second_moments_op = torch.library.custom_op(
    "rocr::triton_second_moments", _add_second_moments, mutates_args=("totals",), **_OUTSIDE_GRAPHS
)
grouped_second_moment_op = torch.library.custom_op(
    "rocr::triton_grouped_second_moment", _add_grouped_second_moment, mutates_args=("totals",), **_OUTSIDE_GRAPHS
)
low_rank_update_op = torch.library.custom_op(
    "rocr::triton_low_rank_update", _update_low_rank, mutates_args=("weights",), **_OUTSIDE_GRAPHS
)

solve_on_support_op = torch.library.custom_op(
    "rocr::triton_solve_on_support", _solve_on_support, mutates_args=(), **_OUTSIDE_GRAPHS
)


@second_moments_op.register_fake
def _(totals: list[Tensor], keys: list[Tensor]) -> None:
    return None


@grouped_second_moment_op.register_fake
def _(totals: list[Tensor], keys: Tensor, offsets: list[int]) -> None:
    return None


@low_rank_update_op.register_fake
def _(
    weights: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    scale: float,
    stochastic: bool,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    return None


@solve_on_support_op.register_fake
def _(weight: Tensor, keys: Tensor, goals: Tensor, basis: Tensor, ridge: float) -> Tensor:
    return basis.new_empty(len(weight), len(basis))
