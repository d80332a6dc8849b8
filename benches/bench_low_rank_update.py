"""Time the low-rank update of a bfloat16 weight against the fastest torch expression and a copy of the weight."""

from __future__ import annotations

import pytest
import torch
from conftest import Compare
from torch import Tensor

from rocr import ops
from rocr.ops import reference

ROWS, COLUMNS = 4096, 14336
ROUNDS = 9


def assert_right(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Assert that every number of 50 rows is within one rounding of the float64 result."""
    updated = weight.clone()
    ops.low_rank_update(updated, left, right)
    rows = torch.randperm(ROWS)[:50]
    exact = reference.updated_weight(weight[rows], left[rows], right)
    error = ((updated[rows].double() - exact).abs() / exact.abs().clamp(min=1e-2)).max()
    assert error < 2.0**-8, f"relative error {error:.3g}"


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def bench_bfloat16_weight(compare: Compare, rank: int) -> None:
    weight, other = (torch.randn(ROWS, COLUMNS).bfloat16() for _ in range(2))
    left, right = torch.randn(ROWS, rank), torch.randn(rank, COLUMNS) * 1e-3
    assert_right(weight, left, right)
    baselines = {
        "W.copy_(W.float().addmm_(left, right))": lambda: weight.copy_(weight.float().addmm_(left, right)),
        "W.copy_(V)": lambda: weight.copy_(other),
    }
    if rank == 1:
        baselines["W.addcmul_(left, right)"] = lambda: weight.addcmul_(left, right)
    compare(
        lambda: ops.low_rank_update(weight, left, right),
        baselines,
        operation=f"low_rank_update, n = {rank}",
        size=f"{ROWS} × {COLUMNS}",
        rounds=ROUNDS,
        bytes_moved=2 * weight.nbytes,
    )
