"""The second moment in the CUDA C++ kernel of csrc/ (rocr._C), for NVIDIA GPUs of sm_90."""

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
    """Return whether rocr._C has CUDA kernels and the device is an NVIDIA GPU of compute capability 9.0."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    try:
        import rocr._C as kernels
    except ImportError:
        return False
    return hasattr(kernels, "cuda_accumulate_second_moments") and torch.cuda.get_device_capability(device) == (9, 0)


def accumulate_second_moment(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the lower triangle of total."""
    accumulate_second_moments([total], [keys])


def accumulate_second_moments(totals: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """Add keysᵀ keys to the lower triangle of each total; equal layouts share a launch.

    Raises:
        InputError: The keys are float32, or the copy engine cannot read their addresses and strides.
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
    if code:
        raise RocrError(f"CUDA could not start the second moments: {kernels.cuda_error(code)}.")


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


@second_moments_op.register_fake
def _(totals: list[Tensor], keys: list[Tensor]) -> None:
    return None


def _check_second_moment(total: Tensor, keys: Tensor) -> None:
    """Raise InputError unless the kernel can run on these operands."""
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


def _dtype(dtype: torch.dtype) -> Any:
    import rocr._C as kernels

    return getattr(kernels.DType, str(dtype).removeprefix("torch."))
