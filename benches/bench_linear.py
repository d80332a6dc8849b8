"""Time a linear layer with a bfloat16 weight in float32, where the CPU has no instructions for it, against torch."""

from __future__ import annotations

import pytest
import torch
from conftest import Compare
from torch.nn import functional

from rocr.ops.wide_products import slow_dtypes, wide_products

D_IN, D_OUT = 1536, 8960
ROUNDS = 5


@pytest.mark.skipif(torch.bfloat16 not in slow_dtypes(), reason="this CPU has instructions for bfloat16 products")
@pytest.mark.parametrize("rows", [1, 4, 16, 256, 4096])
@torch.no_grad()
def bench_bfloat16_linear_layer(compare: Compare, rows: int) -> None:
    given, weight = torch.randn(rows, D_IN).bfloat16(), torch.randn(D_OUT, D_IN).bfloat16()

    def wide() -> None:
        with wide_products():
            functional.linear(given, weight)

    compare(
        wide,
        {"functional.linear": lambda: functional.linear(given, weight)},
        operation=f"bfloat16 linear layer, {rows} rows",
        size=f"{D_IN} → {D_OUT}",
        rounds=ROUNDS,
        operations=2 * rows * weight.numel(),
    )
