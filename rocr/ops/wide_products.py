"""Products of 16-bit matrices in float32, on CPUs without instructions for 16-bit products.

There torch multiplies bfloat16 and float16 matrices several times slower than float32 ones. Inside `wide_products` a
compiled kernel widens the weight of a linear layer where it multiplies it; without the kernel, torch converts the
weight in pieces that stay in the cache. Each result is rounded once to the dtype of the layer. A 16-bit value is exact
in float32, so that only the order of the sums differs.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rocr.ops import cpp_backend

LEAST_ROWS, LEAST_CONVERTED_ROWS = 3, 8
"""Smallest number of rows of a product in the kernel, and of one whose weight torch converts. Reading the weight bounds
products of fewer rows."""
LARGE_WEIGHT = 1 << 20
"""A weight of so many elements is read faster by the kernel than by torch, also for one row."""
MANY_ROWS = 256
PIECE, LARGE_PIECE = 1 << 20, 1 << 22
"""Number of elements of a weight that are converted at a time, for fewer than MANY_ROWS rows and for more."""
NARROW_SETS = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of ONEDNN_MAX_CPU_ISA that leave out the instructions for 16-bit products."""


@contextmanager
def wide_products() -> Iterator[None]:
    """Let linear layers of slow dtypes compute in float32 inside the context; without effect on other CPUs.

    Products that record gradients are left as they are.
    """
    # In a generator, which ends the mode even if a signal interrupts the end of the caller's context.
    dtypes = slow_dtypes()
    with _WideProducts(dtypes) if dtypes else nullcontext():
        yield


def slow_dtypes() -> frozenset[torch.dtype]:
    """Return the 16-bit dtypes for whose products this CPU, as torch may use it, has no instructions."""
    isa = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    if isa in NARROW_SETS:
        return frozenset({torch.bfloat16, torch.float16})
    found = set()
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported() or not _has_bfloat16_instructions():
            found.add(torch.bfloat16)
        if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            found.add(torch.float16)
    except AttributeError:  # a torch without oneDNN
        return frozenset()
    return frozenset(found)


def _has_bfloat16_instructions() -> bool:
    """Return whether the CPU multiplies bfloat16; on x86, torch also says so of chips where oneDNN converts."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    tests = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return not all(tests) or any(test() for test in tests if test is not None)


class _WideProducts(TorchFunctionMode):
    """Replace linear layers and products of experts in some dtypes on the CPU."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes
        self._replaced: dict[Any, Callable[..., Tensor | None]] = {functional.linear: self._linear}
        if hasattr(torch, "_grouped_mm"):  # called by functional.grouped_mm, which itself is not seen here
            self._replaced[torch._grouped_mm] = self._grouped

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replaced = self._replaced.get(function)
        if replaced is not None and not torch.is_grad_enabled():
            found = replaced(*args, **kwargs)
            if found is not None:
                return found
        return function(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Return the output of a linear layer; None leaves it to torch."""
        if not self._applies(input, weight):
            return None
        has_rows = weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1]
        is_compiled = has_rows and cpp_backend.is_available(weight.device)
        rows = input.reshape(-1, input.shape[-1])
        least = LEAST_CONVERTED_ROWS if not is_compiled else 1 if weight.numel() >= LARGE_WEIGHT else LEAST_ROWS
        if len(rows) < least:
            return None
        multiply = cpp_backend.wide_product if is_compiled else product_in_pieces
        return multiply(rows, weight, bias).reshape(*input.shape[:-1], len(weight))

    def _grouped(self, input: Tensor, weight: Tensor, offs: Tensor | None = None, **more: Any) -> Tensor | None:
        """Return the product of the rows of each expert, up to its offset, with its weight; None leaves it to torch."""
        is_plain = input.ndim == 2 and weight.ndim == 3 and all(value is None for value in more.values())
        if offs is None or not is_plain or not self._applies(input, weight):
            return None
        output = input.new_zeros(len(input), weight.shape[-1])
        start = 0
        for expert, end in enumerate(offs.tolist()):
            rows, matrix = input[start:end], weight[expert].T
            if len(rows):
                found = self._linear(rows, matrix)
                output[start:end] = rows @ matrix.T if found is None else found
            start = end
        return output

    def _applies(self, input: Tensor, weight: Tensor) -> bool:
        return (
            type(weight) in (Tensor, nn.Parameter)
            and weight.device.type == "cpu"
            and weight.dtype in self._dtypes
            and input.dtype == weight.dtype
        )


def product_in_pieces(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows @ weight.T + bias, (m, d_out), computed in float32 by torch.

    Args:
        rows: (m, d_in), 16-bit.
        weight: (d_out, d_in) in the dtype of the rows.
        bias: (d_out,) in the same dtype, or None.
    """
    rows = rows.float()
    elements = PIECE if len(rows) < MANY_ROWS else LARGE_PIECE
    columns = max(1, elements // max(1, weight.shape[1]))
    output = torch.empty(len(rows), len(weight), dtype=weight.dtype)
    for start in range(0, len(weight), columns):
        piece = slice(start, start + columns)
        found = rows @ weight[piece].float().T
        output[:, piece] = found if bias is None else found.add_(bias[piece])
    return output
