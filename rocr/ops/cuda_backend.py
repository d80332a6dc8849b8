"""The operations in the CUDA C++ kernels of csrc/ (rocr._C), for NVIDIA GPUs of sm_80 and later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError, RocrError
from rocr.ops.direct import bypass_dispatcher

TILE_WIDTH = 256
"""Width of the square tiles of csrc/second_moment_sm90.cuh."""

TOKEN_STEP = 64
"""Tokens that its blocks multiply at a time."""

MAXIMUM_LAYERS = 16
"""Layers of one launch."""


def is_available(device: torch.device) -> bool:
    """Return whether rocr._C has CUDA kernels and the device is an NVIDIA GPU of compute capability 8.0 or more."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    try:
        import rocr._C as kernels
    except ImportError:
        return False
    return hasattr(kernels, "cuda_low_rank_update") and torch.cuda.get_device_capability(device) >= (8, 0)


def accumulate_second_moment(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the lower triangle of total."""
    accumulate_second_moments([total], [keys])


def accumulate_second_moments(totals: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """Add keysᵀ keys to the lower triangle of each total; equal layouts share a launch. sm_90 only.

    Raises:
        InputError: The device is another chip, the keys are float32, or the copy engine cannot read their addresses and
            strides.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (total, each) in enumerate(zip(totals, keys, strict=True)):
        _check_second_moment(total, each)
        alike.setdefault((total.stride(), each.shape, each.stride(), each.dtype), []).append(index)
    for indices in alike.values():
        for first in range(0, len(indices), MAXIMUM_LAYERS):
            batch = indices[first : first + MAXIMUM_LAYERS]
            of_batch = [totals[index] for index in batch], [keys[index] for index in batch]
            bypass_dispatcher(second_moments_op, _add_second_moments, *of_batch)


def low_rank_update(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float,
    rounding: str,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight; weights of equal layout share a launch."""
    assert not keep_zeros, "a backend without a solve on a support has no update that keeps zeros"
    has_unit_stride = [1 in weight.stride() for weight in weights]
    rows = [weight if fits else weight.contiguous() for weight, fits in zip(weights, has_unit_stride, strict=True)]
    stochastic = rounding == "stochastic"
    bypass_dispatcher(low_rank_update_op, _update_low_rank, rows, list(lefts), list(rights), scale, stochastic, seed)
    for weight, updated in zip(weights, rows, strict=True):
        if updated is not weight:
            weight.copy_(updated)


def _add_second_moments(totals: list[Tensor], keys: list[Tensor]) -> None:
    """Add keysᵀ keys to the lower triangle of each total, at most MAXIMUM_LAYERS of one shape, stride and dtype."""
    import rocr._C as kernels

    make_schedule = _load_schedule()
    tokens, width = keys[0].shape
    blocks = -(-width // TILE_WIDTH)
    with torch.cuda.device(totals[0].get_device()):
        # Two thread blocks share a tile.
        clusters = torch.cuda.get_device_properties(totals[0].device).multi_processor_count // 2
        tiles = len(totals) * blocks * (blocks + 1) // 2
        schedule = make_schedule(tiles, tokens, clusters, TOKEN_STEP)
        slices = torch.zeros(max(1, schedule.slices) * TILE_WIDTH**2, device=totals[0].device)
        code = kernels.cuda_accumulate_second_moments(
            layers=[(each.data_ptr(), total.data_ptr()) for each, total in zip(keys, totals, strict=True)],
            dtype=_dtype(keys[0].dtype),
            tokens=tokens,
            width=width,
            key_stride=keys[0].stride(0),
            total_stride=totals[0].stride(0),
            whole=schedule.whole,
            splits=schedule.splits,
            split_tokens=schedule.split_tokens,
            items=schedule.items,
            clusters=min(clusters, schedule.items),
            slices=slices.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    _raise_unless_done(code, "second moments")


def _update_low_rank(
    weights: list[Tensor], lefts: list[Tensor], rights: list[Tensor], scale: float, stochastic: bool, seed: int
) -> None:
    """Add scale * left @ right to every weight; a weight has unit stride along its rows or its columns."""
    import rocr._C as kernels

    for dtype in dict.fromkeys(weight.dtype for weight in weights):
        updates = [
            _describe(index, weight, left, right)
            for index, (weight, left, right) in enumerate(zip(weights, lefts, rights, strict=True))
            if weight.dtype == dtype and weight.numel() and left.shape[1]
        ]
        # Alike layers side by side, since they share a launch.
        updates.sort(key=lambda update: (update[3:], update[-1]))
        with torch.cuda.device(weights[0].get_device()):
            code = kernels.cuda_low_rank_update(
                updates=updates,
                dtype=_dtype(dtype),
                scale=scale,
                stochastic=stochastic,
                seed=seed,
                stream=torch.cuda.current_stream().cuda_stream,
            )
        _raise_unless_done(code, "low-rank update")


def _load_schedule() -> Any:
    """Return make_schedule, which the Triton kernels share.

    Raises:
        InputError: Triton is not installed.
    """
    try:
        from rocr_kernels._common import make_schedule
    except ImportError as error:
        raise InputError(
            f"The CUDA second moment shares its schedule with the Triton kernels, whose import failed ({error}). "
            "Install triton, or use the backend 'torch'."
        ) from None
    return make_schedule


second_moments_op = torch.library.custom_op("rocr::cuda_second_moments", _add_second_moments, mutates_args=("totals",))
low_rank_update_op = torch.library.custom_op("rocr::cuda_low_rank_update", _update_low_rank, mutates_args=("weights",))


@second_moments_op.register_fake
def _(totals: list[Tensor], keys: list[Tensor]) -> None:
    return None


@low_rank_update_op.register_fake
def _(
    weights: list[Tensor], lefts: list[Tensor], rights: list[Tensor], scale: float, stochastic: bool, seed: int
) -> None:
    return None


def _check_second_moment(total: Tensor, keys: Tensor) -> None:
    """Raise InputError unless the kernel for sm_90 can run on these operands."""
    capability = torch.cuda.get_device_capability(total.device)
    if capability != (9, 0):
        raise InputError(
            f"The CUDA second moment is for compute capability 9.0, but {total.device} has "
            f"{capability[0]}.{capability[1]}; use the backend 'triton'."
        )
    if keys.dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"The CUDA second moment takes 16-bit keys, but these are {keys.dtype}; use 'triton'.")
    if keys.data_ptr() % 16 or keys.stride(0) % 8 or keys.stride(1) != 1:
        raise InputError(
            "The CUDA second moment reads rows of keys that start at multiples of 16 bytes, but these lie at "
            f"{keys.data_ptr():#x} with strides {keys.stride()}; use 'triton'."
        )
    if total.data_ptr() % 8 or total.stride(0) % 2 or total.stride(1) != 1:
        raise InputError(
            "The CUDA second moment adds to rows of a total that start at multiples of 8 bytes, but this lies at "
            f"{total.data_ptr():#x} with strides {total.stride()}; use 'triton'."
        )


def _describe(layer: int, weight: Tensor, left: Tensor, right: Tensor) -> tuple[int, ...]:
    """Return the arguments of rocr._C for one weight. The factors of a transposed weight are swapped."""
    if weight.stride(1) != 1:
        weight, left, right = weight.T, right.T, left.T
    addresses = weight.data_ptr(), left.data_ptr(), right.data_ptr()
    return (
        *addresses,
        *weight.shape,
        weight.stride(0),
        left.shape[1],
        *left.stride(),
        right.stride(1),
        right.stride(0),
        layer,
    )


def _dtype(dtype: torch.dtype) -> Any:
    import rocr._C as kernels

    return getattr(kernels.DType, str(dtype).removeprefix("torch."))


def _raise_unless_done(code: int, work: str) -> None:
    import rocr._C as kernels

    if code:
        raise RocrError(f"CUDA could not start the {work}: {kernels.cuda_error(code)}.")
