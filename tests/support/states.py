"""Settings of torch that a caller may have changed, and a record of all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def reduced_products() -> Iterator[None]:
    """Products of float32 in bfloat16 or TF32, and sums of 16-bit products in less than float32, where torch can."""
    flag = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), flag.allow_fp16_accumulation
    torch.set_float32_matmul_precision("medium")
    flag.allow_fp16_accumulation = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        flag.allow_fp16_accumulation = before[1]


@contextmanager
def no_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def deterministic() -> Iterator[None]:
    """Uninitialised memory holds NaN in this mode."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "reduced products": reduced_products,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "no denormals": no_denormals,
    "deterministic": deterministic,
}


def surroundings() -> dict[str, Any]:
    """Return the current settings of torch."""
    precisions = (
        [
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        ]
        if hasattr(torch.backends.mkldnn, "matmul")
        else []
    )
    matmul = torch.backends.cuda.matmul
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "cache": torch.is_autocast_cache_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "inference": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(),
        "products": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, *precisions),
        "sums": (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        "accumulation": matmul.allow_fp16_accumulation,
        "denormals": sys.float_info.min / 2 > 0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
