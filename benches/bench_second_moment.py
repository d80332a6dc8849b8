"""Time the second moment of a batch of keys against the products of torch and NumPy, in shapes of real layers."""

from __future__ import annotations

import pytest
import torch
from conftest import Compare
from torch import Tensor

from rocr import ops

SHAPES = ((8192, 1536), (8192, 3072), (4096, 8960))
ROUNDS = {1536: 9, 3072: 5, 8960: 3}


def assert_right(keys: Tensor) -> None:
    """Assert that 50 rows of the lower triangle agree with float64."""
    size = keys.shape[1]
    total = ops.accumulate_second_moment(torch.zeros(size, size), keys)
    rows = torch.randperm(size)[:50]
    exact = keys[:, rows].double().T @ keys.double()
    lower = torch.arange(size) <= rows[:, None]
    error = ((total[rows].double() - exact) * lower).norm() / (exact * lower).norm()
    assert error < 1e-6, f"relative error {error:.3g}"


@pytest.mark.parametrize("tokens, size", SHAPES)
def bench_float32_keys(compare: Compare, tokens: int, size: int) -> None:
    keys, total = torch.randn(tokens, size), torch.zeros(size, size)
    assert_right(keys)
    array = keys.numpy()
    compare(
        lambda: ops.accumulate_second_moment(total, keys),
        {"C.addmm_(H.T, H)": lambda: total.addmm_(keys.T, keys), "NumPy H.T @ H": lambda: array.T @ array},
        operation="accumulate_second_moment, float32 keys",
        size=f"{tokens} × {size}",
        rounds=ROUNDS[size],
        operations=tokens * size * (size + 1),
    )


@pytest.mark.parametrize("tokens, size", SHAPES)
def bench_bfloat16_keys(compare: Compare, tokens: int, size: int) -> None:
    keys, total = torch.randn(tokens, size), torch.zeros(size, size)
    halves = keys.bfloat16()
    assert_right(halves)
    compare(
        lambda: ops.accumulate_second_moment(total, halves),
        {"rocr, float32 keys": lambda: ops.accumulate_second_moment(total, keys)},
        operation="accumulate_second_moment, bfloat16 keys",
        size=f"{tokens} × {size}",
        rounds=ROUNDS[size],
        operations=tokens * size * (size + 1),
    )
