"""What every launch needs: the chip's size, a table of addresses on the device, and scratch memory."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETER_PROGRAMS = 3
"""Programs of a launch in Triton's interpreter, which has no multiprocessors."""


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; the interpreter counts as sm_90."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_small_memory(compute_capability: tuple[int, int]) -> bool:
    """Whether a program gets 99 KiB of shared memory at most, as on consumer chips, not 163 KiB or more."""
    return compute_capability in ((8, 6), (8, 7), (8, 9)) or compute_capability[0] == 12


def registers(programs: int, warps: int) -> int:
    """Most registers of a thread with which so many programs of so many warps share a multiprocessor's 65,536."""
    return min(255, 65536 // (programs * warps * 32) // 8 * 8)


def offset_type(*distances: int) -> tl.dtype:
    """Type of the distances, in numbers, within a tile: 64 bits cost registers, and few strides need them."""
    return tl.int64 if max(distances) >= 1 << 31 else tl.int32


class CaptureError(RuntimeError):
    """A table of addresses was to be made while a CUDA graph is captured."""


def address_table(tensors: Sequence[Sequence[Tensor]], numbers: Sequence[int] = ()) -> Tensor:
    """Addresses of all tensors, one list after the other, then numbers, as int64 on the tensors' device.

    The copy from pinned memory does not wait for the device.

    Raises:
        CaptureError: a CUDA graph is captured, which would read that memory again when it is used otherwise.
    """
    device = tensors[0][0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            "The Triton kernels cannot be captured in a CUDA graph: they copy a table of addresses from memory that is "
            "used otherwise when the graph runs. Call them outside the capture, or use the backend 'torch' or 'cuda'."
        )
    entries = [tensor.data_ptr() for group in tensors for tensor in group] + list(numbers)
    table = torch.tensor(entries, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def run_with_scratch(device: torch.device, launch: Callable[[], object]) -> None:
    """Run a launch whose kernel makes TMA descriptors on the device, with torch's memory to hold them."""
    context = contextvars.copy_context()
    context.run(
        triton.set_allocator,
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device),
    )
    context.run(launch)
