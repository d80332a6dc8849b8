"""The formulas in float64, which all other backends are tested against.

Rows are samples everywhere: keys (n, d_in) and residuals (n, d_out), the transposes of the papers' K and R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rocr.ops.rounding import round_into


def is_available(device: torch.device) -> bool:
    """Return whether this backend runs on the device: on all that support float64."""
    return device.type != "mps"


def second_moment(keys: Tensor) -> Tensor:
    """Return the sum of k kᵀ over the rows of keys (t, d): (d, d) float64, both triangles."""
    exact = keys.double()
    return exact.T @ exact


def updated_weight(weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Return weight + scale * left @ right, (d_out, d_in) float64, not rounded."""
    return weight.double() + scale * (left.double() @ right.double())


def accumulate_second_moment(total: Tensor, keys: Tensor) -> None:
    """Add the second moment of keys (t, d) to the lower triangle of total (d, d), with one rounding."""
    rows, columns = torch.tril_indices(*total.shape, device=total.device)
    total[rows, columns] = (total.double() + second_moment(keys))[rows, columns].to(total.dtype)


def accumulate_grouped_second_moment(totals: Tensor, keys: Tensor, offsets: Sequence[int]) -> None:
    """Add the second moment of rows offsets[e] to offsets[e + 1] of keys to the lower triangle of totals[e]."""
    for total, start, end in zip(totals, offsets, offsets[1:], strict=False):
        if end > start:
            accumulate_second_moment(total, keys[start:end])


def low_rank_update(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float,
    rounding: str,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    """Write `updated_weight` to every weight, or to its elements that are not zero, with one rounding to its dtype."""
    generator = torch.Generator(weights[0].device).manual_seed(seed) if weights else None
    for weight, left, right in zip(weights, lefts, rights, strict=True):
        before = weight.clone()
        round_into(weight, updated_weight(weight, left, right, scale), rounding, generator)
        if keep_zeros:
            weight.copy_(torch.where(before == 0, before, weight))


def solve_on_support(weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Return the coefficients (d_out, m) of each row, as the least squares of [A_i; √λ I] z_i = [r_i; 0]."""
    keys, residuals, basis = keys.double(), residuals.double(), basis.double()
    identity = torch.eye(len(basis), dtype=torch.float64, device=basis.device)
    found = []
    for row, wanted in zip(weight, residuals.T, strict=True):
        support = row != 0
        stacked = torch.cat([keys[:, support] @ basis[:, support].T, ridge**0.5 * identity])
        goal = torch.cat([wanted, wanted.new_zeros(len(basis))])
        found.append(torch.linalg.lstsq(stacked, goal[:, None], driver="gels").solution[:, 0])
    return torch.stack(found).float()


def dense_update(keys: Tensor, residuals: Tensor, metric: Tensor | None, ridge: float) -> Tensor:
    """Return the update Xᵀ (d_out, d_in) of the authors' (d_in, d_in) system [M Kᵀ K + λI] X = M Kᵀ R.

    Source:
        Ye, Zhang and Wu, arXiv 2506.07795, with the metric M in place of the projector P.
    """
    keys, residuals = keys.double(), residuals.double()
    identity = torch.eye(keys.shape[1], dtype=torch.float64, device=keys.device)
    projected_keys = (identity if metric is None else metric.double()) @ keys.T
    solution: Tensor = torch.linalg.solve(projected_keys @ keys + ridge * identity, projected_keys @ residuals)
    return solution.T
