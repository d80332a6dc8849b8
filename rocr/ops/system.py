"""The (n, n) system that an update is solved from, in float64: metric, Gram matrix, Cholesky factor, and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rocr.errors import GuardError, InputError
from rocr.ops import checks

SMALL_SYSTEM = 64
"""Size of a system from which a GPU solves it by its inverse."""


class Metric(Protocol):
    """A symmetric positive semidefinite matrix M (d_in, d_in) that need not be stored as one."""

    def apply(self, keys: Tensor) -> Tensor:
        """Return keys @ M for keys (n, d_in)."""
        ...


def solve(factor: Tensor, columns: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ columns (n, d) for the lower factor L (n, n), both float64.

    On a GPU by the inverse: triangular solves of so many columns take it three times as long as products. What an
    inverse loses, 1e-16 times the condition number, is far below what float32 keys hold.
    """
    if factor.is_cuda and len(factor) >= SMALL_SYSTEM:
        return solve_by_inverse(factor, columns)
    return torch.cholesky_solve(columns, factor)


def solve_by_inverse(factor: Tensor, columns: Tensor) -> Tensor:
    """Return the same, by products."""
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.T @ inverse @ columns


def apply_metric(metric: Tensor | Metric | None, keys: Tensor) -> Tensor:
    """Return keys @ metric (n, d_in), in the dtype it comes in."""
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
    """A Gram matrix and the system that was made of it.

    Attributes:
        gram: (m, m) float64, symmetric.
        factor: lower Cholesky factor (m, m) float64 of gram + λI.
    """

    gram: Tensor
    factor: Tensor


def solve_small(
    keys: Tensor, residuals: Tensor, weighted_keys: Tensor, ridge: float
) -> tuple[Tensor, Tensor, FactoredGram]:
    """Solve Δ = residualsᵀ (K M Kᵀ + λI)⁻¹ K M from K M.

    Args:
        keys: K, (n, d_in), floating point.
        residuals: (n, d_out).
        weighted_keys: K M, (n, d_in).
        ridge: λ >= 0.

    Returns:
        left (d_out, n) and right (n, d_in) with Δ = left @ right, in the dtype of keys, float32 at least; and the
        system.

    Raises:
        InputError: K M Kᵀ is not symmetric.
        GuardError: numbers that are not finite, or a system too close to singular.
    """
    weighted_keys = weighted_keys.double()
    dtype = torch.promote_types(keys.dtype, torch.float32)
    # A clone: the transpose of a single row is contiguous already, and would share its memory.
    left = residuals.T.to(dtype).clone(memory_format=torch.contiguous_format)
    solved = factor_gram(keys.double() @ weighted_keys.T, ridge, len(keys))
    return left, solve(solved.factor, weighted_keys).to(dtype).contiguous(), solved


def factor_gram(gram: Tensor, ridge: float, keys: int) -> FactoredGram:
    """Factor gram (m, m) float64 + λI, made of so many keys.

    Raises:
        InputError: the Gram matrix is not symmetric.
        GuardError: it is not finite, or the system is too close to singular.
    """
    require_finite("the Gram matrix of the keys", gram)
    if not gram.numel():
        return FactoredGram(gram, gram)
    # One wait for the device, not two.
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
    # The pivots of an exactly singular system come out as rounding errors of its largest element.
    smallest = 0.0 if failed_at.item() else (pivots.min() ** 2 / system.diagonal().max()).item()
    if smallest <= len(system) * torch.finfo(torch.float64).eps:
        raise GuardError(
            f"The system of {keys} keys is singular (smallest relative pivot {smallest:.3g}, "
            f"ridge {ridge:.3g}, largest element {largest:.3g}): keys repeat or the metric removes them; "
            "raise the ridge."
        )
    return FactoredGram(gram, factor)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise GuardError if a number of a tensor is not finite."""
    # One number that is not finite makes the sum so; counting them takes six times as long.
    if tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
        return
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise GuardError(f"{bad} of {tensor.numel()} numbers of {name} are not finite; nothing was solved.")
