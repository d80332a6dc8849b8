"""Bench of the solve: the (n, n) system of rocr against the dense (d_in, d_in) system of ROCR's authors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpu_timing import Row, interleave, relative_error
from torch import Tensor

from rocr import ops

RIDGE = 1.0


@dataclass(frozen=True)
class Complement:
    """The projector I - U Uᵀ for an orthonormal `basis` U (d_in, r), without forming it."""

    basis: Tensor

    def apply(self, keys: Tensor) -> Tensor:
        """Return keys @ (I - U Uᵀ)."""
        return keys - (keys @ self.basis) @ self.basis.T


def solve(device: torch.device, width: int, outputs: int, count: int, rounds: int) -> list[Row]:
    """Time the float32 updates of keys (count, width) with a projector."""
    keys = torch.randn(count, width, device=device)
    residuals = torch.randn(count, outputs, device=device)
    basis = torch.linalg.qr(torch.randn(width, width // 8, device=device)).Q.contiguous()
    metric = Complement(basis)
    projector = torch.eye(width, device=device) - basis @ basis.T
    identity = torch.eye(width, device=device)

    def official() -> Tensor:
        system = projector @ (keys.T @ keys) + RIDGE * identity
        return torch.linalg.solve(system, projector @ keys.T @ residuals).T

    left, right = ops.solve_update(keys, residuals, metric, RIDGE)
    # Both are compared with float64 on their first 64 rows, from the (n, n) system.
    wide = Complement(basis.double()).apply(keys.double())
    gram = wide @ keys.double().T + RIDGE * torch.eye(count, dtype=torch.float64, device=device)
    exact = residuals[:, :64].double().T @ torch.linalg.solve(gram, wide)
    error = {"rocr": relative_error(left[:64] @ right, exact), "official": relative_error(official()[:64], exact)}
    functions = {
        "rocr": lambda _: ops.solve_update(keys, residuals, metric, RIDGE),
        "official": lambda _: official(),
    }
    times = interleave(functions, device, rounds, few=("official",))
    note = "the official form, without copying the projector from the host"
    return [Row("solve", f"d_in = {width}, n = {count}", times, "rocr", "official", 100, 1000, error, {}, note)]
