"""Time the solve of an update: the (n, n) system of rocr against the dense (d_in, d_in) system of ROCR's authors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from conftest import Compare
from torch import Tensor

from rocr import ops
from rocr.ops import reference

KEYS, INPUTS, OUTPUTS = 100, 8960, 1536
PROTECTED = 256
RIDGE = 1.0
ROUNDS = 3


@dataclass(frozen=True)
class Projector:
    """The metric I - U Uᵀ for an orthonormal U (d_in, r)."""

    complement: Tensor

    def apply(self, keys: Tensor) -> Tensor:
        """Return keys @ (I - U Uᵀ)."""
        return keys - (keys @ self.complement) @ self.complement.T


def bench_solve_update(compare: Compare) -> None:
    keys, residuals = torch.randn(KEYS, INPUTS), torch.randn(KEYS, OUTPUTS)
    complement = torch.linalg.qr(torch.randn(INPUTS, PROTECTED)).Q
    metric = torch.eye(INPUTS) - complement @ complement.T
    projector = Projector(complement)

    left, right = ops.solve_update(keys, residuals, projector, RIDGE)
    exact = reference.dense_update(keys, residuals, metric, RIDGE)
    error = (left.double() @ right.double() - exact).norm() / exact.norm()
    assert error < 1e-5, f"relative error {error:.3g}"
    del exact

    def dense() -> Tensor:
        weighted_keys = metric @ keys.T
        system = weighted_keys @ keys
        system.diagonal().add_(RIDGE)
        return torch.linalg.solve(system, weighted_keys @ residuals).T

    compare(
        lambda: ops.solve_update(keys, residuals, projector, RIDGE),
        {"torch.linalg.solve (d_in × d_in)": dense},
        operation=f"solve_update, n = {KEYS}",
        size=f"{INPUTS} → {OUTPUTS}",
        rounds=ROUNDS,
    )
