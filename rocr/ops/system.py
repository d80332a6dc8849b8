"""The (n, n) system of an update in float64: metric, Gram matrix, Cholesky factor and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rocr.errors import GuardError, InputError
from rocr.ops import checks

INVERSE_SIZE = 64
"""Minimum size of a system that is solved by its inverse on a GPU."""


class Metric(Protocol):
    """A symmetric positive semidefinite matrix M (d_in, d_in), which need not be stored as a matrix."""

    def apply(self, keys: Tensor) -> Tensor:
        """Return keys @ M for keys (n, d_in)."""
        ...


def solve_by_factor(factor: Tensor, columns: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ columns (n, d) for the lower factor L (n, n), both float64.

    On a GPU, the inverse of the factor is used: triangular solves of many columns take three times as long as
    products there. The error of the inverse, 1e-16 times the condition number, is far below the precision of float32
    keys.
    """
    if factor.is_cuda and len(factor) >= INVERSE_SIZE:
        return solve_by_inverse(factor, columns)
    return torch.cholesky_solve(columns, factor)


def solve_by_inverse(factor: Tensor, columns: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ columns (n, d), by products with the inverse of L."""
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.T @ inverse @ columns


def apply_metric(metric: Tensor | Metric | None, keys: Tensor) -> Tensor:
    """Return keys @ metric (n, d_in), where a metric of None is the identity."""
    if metric is None:
        return keys
    if isinstance(metric, Tensor):
        checks.check_metric(metric, keys)
        dtype = torch.promote_types(torch.promote_types(keys.dtype, metric.dtype), torch.float32)
        return keys.to(dtype) @ metric.to(dtype)
    weighted_keys = metric.apply(keys)
    if weighted_keys.shape != keys.shape:
        raise InputError(f"metric.apply must return {tuple(keys.shape)}, but returned {tuple(weighted_keys.shape)}.")
    return weighted_keys


@dataclass(frozen=True)
class FactoredGram:
    """A Gram matrix, and the Cholesky factor of the system that it is part of.

    Attributes:
        gram: (m, m) float64, symmetric.
        factor: Lower Cholesky factor (m, m) float64 of gram + λI.
    """

    gram: Tensor
    factor: Tensor


def solve_weighted(
    keys: Tensor, residuals: Tensor, weighted_keys: Tensor, ridge: float
) -> tuple[Tensor, Tensor, FactoredGram]:
    """Solve Δ = Rᵀ (K M Kᵀ + λI)⁻¹ K M, given K M.

    Args:
        keys: K (n, d_in), floating point.
        residuals: R (n, d_out), floating point.
        weighted_keys: K M (n, d_in), floating point.
        ridge: λ >= 0.

    Returns:
        left (d_out, n) and right (n, d_in) with Δ = left @ right, in the dtype of keys but at least float32; and the
        system in float64.

    Raises:
        InputError: K M Kᵀ is not symmetric.
        GuardError: The Gram matrix is not finite, or the system is singular to working precision.
    """
    weighted_keys = weighted_keys.double()
    dtype = torch.promote_types(keys.dtype, torch.float32)
    # clone, since contiguous would return the memory of the residuals for a single row.
    left = residuals.T.to(dtype).clone(memory_format=torch.contiguous_format)
    solved = factor_gram(keys.double() @ weighted_keys.T, ridge, len(keys))
    return left, solve_by_factor(solved.factor, weighted_keys).to(dtype).contiguous(), solved


def factor_gram(gram: Tensor, ridge: float, keys: int) -> FactoredGram:
    """Factor gram + λI.

    Args:
        gram: (m, m) float64, K M Kᵀ or Bᵀ Kᵀ K B.
        ridge: λ >= 0.
        keys: Number of keys, for the message.

    Raises:
        InputError: The Gram matrix is not symmetric.
        GuardError: The Gram matrix is not finite, or the system is singular to working precision.
    """
    require_finite("the Gram matrix of the keys", gram)
    if not gram.numel():
        return FactoredGram(gram, gram)
    # One transfer from the device, not two.
    largest, asymmetry = torch.stack((gram.abs().max(), (gram - gram.T).abs().max())).tolist()
    if asymmetry > 1e-3 * largest:
        raise InputError(
            f"metric must be symmetric, but keys @ metric @ keys.T differs from its transpose "
            f"by {asymmetry:.3g} where its largest element is {largest:.3g}."
        )
    gram = (gram + gram.T) / 2
    system = gram.clone()
    system.diagonal().add_(ridge)
    factor: Tensor
    factor, failed_at = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal()
    # The smallest pivot of a singular system is a rounding error of its largest element.
    smallest = 0.0 if failed_at.item() else (pivots.min() ** 2 / system.diagonal().max()).item()
    if smallest <= len(system) * torch.finfo(torch.float64).eps:
        raise GuardError(
            f"The system of {keys} keys is singular (smallest relative pivot {smallest:.3g}, "
            f"ridge {ridge:.3g}, largest element {largest:.3g}): keys are equal or the metric removes them; "
            "raise the ridge."
        )
    return FactoredGram(gram, factor)


def require_solvable(failed: bool | Tensor, ridge: float) -> None:
    """Raise GuardError if the system of some row of a weight could not be factored."""
    if failed:
        raise GuardError(
            f"The system of a row is singular to working precision at the ridge {ridge:.3g}: the keys are equal or "
            "very long on the support of the row; raise the ridge."
        )


def all_finite(tensor: Tensor) -> bool:
    """Return whether all elements of a tensor are finite."""
    # A sum is finite only if all elements are; looking at each takes six times as long.
    if tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
        return True
    # Row by row: a mask of the tensor's size takes memory.
    return all(bool(rows.isfinite().all()) for rows in tensor)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise GuardError unless all elements of a tensor are finite."""
    if not all_finite(tensor):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise GuardError(f"{bad} of {tensor.numel()} elements of {name} are not finite; no update was computed.")
