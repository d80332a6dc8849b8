"""What the Triton kernels share: bfloat16 splits, stochastic rounding, launch parameters and the schedule of items.

bf16 split: a float32 value as a sum of bfloat16 terms, high + middle (+ low). Tensor cores multiply the terms exactly.
Two terms keep 16 significant bits of the value, three keep all 24. `bf16_splits` is the number of terms.

Tensor shapes are noted as [rows, columns]. Every kernel takes BACKEND, the name that backend_of returns. In Triton's
interpreter a bfloat16 conversion truncates, tl.dot multiplies the bit patterns of bfloat16, and no assembly runs.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETER_PROGRAMS = 3
"""Programs of a launch in Triton's interpreter, which has no multiprocessors."""

MAXIMUM_SPLITS = 16
"""Largest number of items that share one tile; each needs a slice of memory."""

MINIMUM_SPLIT_TOKENS = 1024
"""Fewest tokens of an item that shares a tile; with fewer, writing the tile takes as long as computing it."""

ITEM_TOKENS = 512
"""Estimated cost of starting an item and adding its tile to memory, in tokens of computation."""


# bfloat16 arithmetic


@triton.jit
def to_bfloat16(value, BACKEND: tl.constexpr):
    """Round float32 to bfloat16, ties to even."""
    if BACKEND == "interpreter":
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(tl.bfloat16)


@triton.jit
def dot(left, right, accumulator, BACKEND: tl.constexpr):
    """Return accumulator + left @ right in float32, for 16-bit operands."""
    if BACKEND == "interpreter":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(left, right, accumulator)


@triton.jit
def opaque(value, BACKEND: tl.constexpr):
    """Return value through an instruction that the compiler does not optimize across.

    Without it the compiler rewrites accumulator + dot(left, right, 0) as dot(left, right, accumulator), which
    truncates the sum in the tensor cores.
    """
    if BACKEND == "interpreter":
        return value
    elif BACKEND == "hip":
        return tl.inline_asm_elementwise("v_mov_b32 $0, $1", "=v,v", [value], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def split_bf16(value, BF16_SPLITS: tl.constexpr, BACKEND: tl.constexpr):
    """Return the high, middle and low bfloat16 terms of float32; with two splits, middle takes the place of low."""
    high = to_bfloat16(value, BACKEND)
    value -= high.to(tl.float32)
    middle = to_bfloat16(value, BACKEND)
    if BF16_SPLITS == 3:
        return high, middle, to_bfloat16(value - middle.to(tl.float32), BACKEND)
    else:
        return high, middle, middle


# Stochastic rounding


@triton.jit
def random_bits(seed, first, second, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return 16 random bits for each element of a tile, as uint32 [ROWS, COLUMNS].

    One Philox draw serves eight neighbouring elements of a row. first, [ROWS, COLUMNS // 8], is the index of the eight
    elements within the matrix, and second the index of the matrix, so the bits do not depend on the tile shape.
    """
    zero = first * 0
    word0, word1, word2, word3 = tl.philox(seed, first, zero + second, zero, zero)
    words = tl.join(tl.join(word0, word1), tl.join(word2, word3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLUMNS))


@triton.jit
def round_stochastic(value, bits, TYPE: tl.constexpr):
    """Round float32 to a bfloat16 or float16 neighbour with the expectation of value; 16 random bits choose it.

    The result is float32, which holds both neighbours exactly. Infinities and NaN stay as they are.
    """
    pattern = value.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == TYPE:
        rounded = ((pattern + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((pattern + (bits >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2**-14 the spacing of float16 is 2**-24.
        scaled = value * 16777216.0
        floor = tl.floor(scaled)
        fixed = (floor + tl.where((scaled - floor) * 65536.0 > bits.to(tl.float32), 1.0, 0.0)) * 5.9604644775390625e-8
        rounded = tl.where(tl.abs(value) < 6.103515625e-5, fixed, rounded)
    return tl.where(tl.abs(value) < float("inf"), rounded, value)


# Launch parameters


POINTERS_ONLY = (8, 0)
"""Compute capability for which configurations are chosen that move everything through pointers."""

HIP_STAGES = 2
"""Most steps that are loaded ahead on an AMD GPU: a program has 64 KiB of shared memory there."""


def backend_of(device: torch.device) -> str:
    """Return what compiles the kernels for a device: "cuda", "hip" or "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; (9, 0) in the interpreter, POINTERS_ONLY for an AMD GPU."""
    if backend_of(device) == "hip":
        return POINTERS_ONLY
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a device; INTERPRETER_PROGRAMS in the interpreter."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_small_shared_memory(compute_capability: tuple[int, int]) -> bool:
    """Whether a program has at most 99 KiB of shared memory (consumer chips); others have at least 163 KiB."""
    return compute_capability in ((8, 6), (8, 7), (8, 9)) or compute_capability[0] == 12


def max_registers(programs: int, warps: int) -> int:
    """Registers for each thread when `programs` programs of `warps` warps share the 65,536 of a multiprocessor."""
    return min(255, 65536 // (programs * warps * 32) // 8 * 8)


def register_limit(backend: str, programs: int, warps: int) -> dict[str, int]:
    """Option of a launch that limits the registers of a thread; Triton has none for AMD GPUs."""
    return {} if backend == "hip" else {"maxnreg": max_registers(programs, warps)}


def steps_ahead(backend: str, stages: int) -> int:
    """Number of steps that a launch loads ahead."""
    return min(stages, HIP_STAGES) if backend == "hip" else stages


def offset_type(*distances: int) -> tl.dtype:
    """Integer type for offsets within a tile, given the largest ones in elements; int32 saves registers."""
    return tl.int64 if max(distances) >= 1 << 31 else tl.int32


class CaptureError(RuntimeError):
    """A launch needs a table of addresses while a CUDA graph is being captured."""


def address_table(tensors: Sequence[Sequence[Tensor]], indices: Sequence[int] = ()) -> Tensor:
    """Return the addresses of all tensors, list after list, then indices, as int64 on the tensors' device.

    The table is copied from pinned memory, so the call does not wait for the device.

    Raises:
        CaptureError: a CUDA graph is being captured. A replay would copy the pinned memory again, after its reuse.
    """
    device = tensors[0][0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            "The Triton kernels cannot be captured in a CUDA graph: a launch copies a table of addresses from host "
            "memory that is reused before the graph runs. Call them outside the capture, or use the backend 'torch'."
        )
    entries = [tensor.data_ptr() for group in tensors for tensor in group] + list(indices)
    table = torch.tensor(entries, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def run_with_scratch(device: torch.device, launch: Callable[[], object]) -> None:
    """Run a launch whose kernel builds TMA descriptors on the device; their memory comes from torch's allocator."""
    context = contextvars.copy_context()
    context.run(
        triton.set_allocator,
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device),
    )
    context.run(launch)


# Schedule of second moments; the CUDA kernel of csrc/second_moment_sm90.cuh uses it too


@dataclass(frozen=True)
class Schedule:
    """The items of a launch. Tiles of full rounds of programs are one item each; the rest are split over tokens.

    Attributes:
        tiles: number of tiles of all layers.
        whole: number of tiles, the first ones, that are one item each. Such an item sums all tokens and adds to the
            total itself.
        splits: number of items that share each remaining tile. They write to slices, which are summed in order.
        split_tokens: tokens of an item of a remaining tile, a multiple of the token step; the last one has fewer.
    """

    tiles: int
    whole: int
    splits: int
    split_tokens: int

    @property
    def items(self) -> int:
        """Number of items of the launch."""
        return self.whole + (self.tiles - self.whole) * self.splits

    @property
    def slices(self) -> int:
        """Number of tiles of memory that the items need beside the totals."""
        return self.items - self.whole


def make_schedule(tiles: int, tokens: int, programs: int, token_step: int) -> Schedule:
    """Share tiles among programs so that all finish at nearly the same time.

    The tiles beyond the last full round would occupy a few programs while the others wait. They are split over tokens
    into the number of items that finishes first.

    Args:
        tiles: number of tiles of all layers.
        tokens: tokens that each tile sums.
        programs: programs that run at a time.
        token_step: tokens that a program multiplies at a time.
    """
    whole = tiles // programs * programs
    rest = tiles - whole
    best = (float("inf"), 1, tokens)
    for splits in range(1, MAXIMUM_SPLITS + 1):
        split_tokens = -(-tokens // (splits * token_step)) * token_step
        if splits > 1 and (split_tokens < MINIMUM_SPLIT_TOKENS or (splits - 1) * split_tokens >= tokens):
            continue
        rounds = -(-rest * splits // programs)
        best = min(best, (rounds * (split_tokens + ITEM_TOKENS), splits, split_tokens))
    _, splits, split_tokens = best
    if not rest or splits == 1:
        return Schedule(tiles, whole=tiles, splits=1, split_tokens=tokens)
    return Schedule(tiles, whole, splits, split_tokens)
