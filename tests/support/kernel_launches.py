"""Launches of the Triton kernels, recorded instead of carried out, and compiled for a chip that need not be there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from rocr_kernels import grouped_second_moment, low_rank_update, second_moment, second_moment_terms, support_solve
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

LAUNCHING = (grouped_second_moment, low_rank_update, second_moment, second_moment_terms, support_solve)
"""The modules that launch kernels."""

LAUNCHED = (
    "add_second_moments_tma",
    "add_second_moments_pointers",
    "add_slices",
    "add_grouped_second_moments",
    "add_group_slices",
    "split_keys",
    "split_factors",
    "add_low_rank_resident",
    "add_low_rank_column_strips",
    "add_low_rank_bf16_splits",
    "sum_on_support",
    "solve_rows",
)
"""The kernels that they launch."""

OPTIONS = ("num_warps", "num_stages", "maxnreg")
"""Arguments of a launch that the compiler takes, not the kernel."""

CUDA_WARP, HIP_WARP = 32, 64
"""Threads of a warp."""

Launch = tuple[Any, dict[str, Any]]


@dataclass
class Recorder:
    """Stands where a kernel is launched, and keeps the arguments."""

    kernel: Any
    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(self, *values: Any, **named: Any) -> None:
        self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, values, strict=False)) | named))


def record_launches(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[Launch]:
    """Return the list that launches will be recorded in, with the arguments that "cuda" or "hip" gets."""
    found: list[Launch] = []
    for module in LAUNCHING:
        if hasattr(module, "backend_of"):
            monkeypatch.setattr(module, "backend_of", lambda _: backend)
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and name in LAUNCHED:
                monkeypatch.setattr(module, name, Recorder(value, found))
    return found


def compile_launch(kernel: Any, arguments: dict[str, Any], chip: int | str) -> Any:
    """Compile as triton.jit does on a launch: an int of 1 is a constant, multiples of 16 are known to be such.

    Args:
        kernel: The kernel.
        arguments: Those of the launch.
        chip: A compute capability, such as 90, or the name of an AMD chip, such as "gfx942".
    """
    signature, constants, attributes = {}, {}, {}
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    annotated = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in annotated or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        pointer = isinstance(value, torch.Tensor)
        types = {torch.int64: "*i64", torch.float32: "*fp32", torch.bfloat16: "*bf16"}
        types |= {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}
        integer = "i32" if isinstance(value, int) and value < 1 << 31 else "i64"
        signature[name] = types[value.dtype] if pointer else "fp32" if isinstance(value, float) else integer
        number = value.data_ptr() if pointer else value
        if isinstance(number, int) and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", chip, CUDA_WARP) if isinstance(chip, int) else GPUTarget("hip", chip, HIP_WARP)
    return triton.compile(source, target=target, options=options)
