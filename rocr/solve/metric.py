"""The metric M that protects ordinary keys: what a key has in common with them is weakened or removed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rocr.config import EditConfig
from rocr.errors import GuardError
from rocr.ops.system import Metric

TRACE_PROBES = 64
ROWS_AT_ONCE = 1024
EIGEN_PROBES = 4


class FactoredMetric(Metric, Protocol):
    """A metric M that knows a root B with M = B Bᵀ, and what ordinary keys are under it."""

    def root(self, keys: Tensor) -> Tensor:
        """Return keys @ B, (n, d_in), for one B with M = B Bᵀ."""
        ...

    def root_transposed(self, rows: Tensor) -> Tensor:
        """Return rows @ Bᵀ, (m, d_in), for the same B."""
        ...

    @property
    def ordinary(self) -> float:
        """Mean squared length of ordinary keys under the metric, tr(C M): the unit of a relative ridge."""
        ...

    def describe(self) -> str:
        """Say in a few words what the metric does, for reports."""
        ...


@dataclass(frozen=True)
class WhitenedMetric:
    """M = (γ C / mean(diag C) + I)⁻¹, as in ROME (arXiv 2202.05262, eq. 2) and MEMIT, with the identity as floor.

    Attributes:
        factor: (d_in, d_in) lower Cholesky factor of M⁻¹.
        gamma: γ, the weight of ordinary keys.
        ordinary: tr(C M), estimated.
    """

    factor: Tensor
    gamma: float
    ordinary: float

    def apply(self, keys: Tensor) -> Tensor:
        """Return keys @ M by two triangular solves."""
        return _solve(self.factor, keys.to(self.factor).T).T

    def root(self, keys: Tensor) -> Tensor:
        """Return keys @ L⁻ᵀ, where M⁻¹ = L Lᵀ."""
        reduced: Tensor = torch.linalg.solve_triangular(self.factor, keys.to(self.factor).T, upper=False)
        return reduced.T

    def root_transposed(self, rows: Tensor) -> Tensor:
        """Return rows @ L⁻¹."""
        expanded: Tensor = torch.linalg.solve_triangular(self.factor, rows.to(self.factor), upper=False, left=False)
        return expanded

    def describe(self) -> str:
        """Say how strongly ordinary keys are weighed."""
        return f"whitened, γ = {self.gamma:g}"


@dataclass(frozen=True)
class ProjectedMetric:
    """M = P, the projector on the eigenvectors of C below a threshold (ROCR, arXiv 2506.07795, and AlphaEdit).

    P is never formed: the thinner of two bases is kept.

    Attributes:
        basis: (d_in, r) orthonormal columns.
        protected: whether `basis` spans the protected directions (P = I - UUᵀ) or the free ones (P = UUᵀ).
        ordinary: tr(C P), the sum of the free eigenvalues.
    """

    basis: Tensor
    protected: bool
    ordinary: float

    def apply(self, keys: Tensor) -> Tensor:
        """Return keys @ P."""
        keys = keys.to(self.basis)
        along = (keys @ self.basis) @ self.basis.T
        return keys - along if self.protected else along

    def root(self, keys: Tensor) -> Tensor:
        """Return keys @ P, since P = P Pᵀ."""
        return self.apply(keys)

    def root_transposed(self, rows: Tensor) -> Tensor:
        """Return rows @ Pᵀ."""
        return self.apply(rows)

    @property
    def free_directions(self) -> int:
        """The rank of P."""
        size, rank = self.basis.shape
        return size - rank if self.protected else rank

    def describe(self) -> str:
        """Say how many directions the update may use."""
        if self.free_directions == self.basis.shape[0]:
            return f"projected, all {self.free_directions} directions free: ordinary keys are not protected"
        return f"projected, {self.free_directions} of {self.basis.shape[0]} directions free"


def build_metric(
    second_moment: Tensor, config: EditConfig, held: Tensor | None = None
) -> WhitenedMetric | ProjectedMetric:
    """Build the configured metric from the mean second moment of ordinary keys.

    Args:
        second_moment: (d_in, d_in) symmetric, float32 or float64: C = sum(k kᵀ) / tokens.
        config: method, gamma, threshold, held_weight.
        held: (h, d_in) keys that are protected besides, as `config.held_weight` says; None: none.

    Raises:
        GuardError: C is not finite or zero, γ C is indefinite by its rounding, or no direction lies below the
            threshold.
    """
    scale = second_moment.diagonal().mean()
    if not all_finite(second_moment) or scale <= 0:
        raise GuardError("The second moment is not finite or zero: collect the statistics again on ordinary text.")
    rows = _held_rows(second_moment, config, held)
    if config.method == "whitened":
        factor = _cholesky(second_moment, config.gamma / float(scale), rows)
        return WhitenedMetric(factor, config.gamma, _trace_of_product(second_moment, factor))
    if rows is not None:
        second_moment = torch.addmm(second_moment, rows.T, rows)
    return _projected(second_moment, config.threshold * float(scale) if config.relative_threshold else config.threshold)


def _held_rows(second_moment: Tensor, config: EditConfig, held: Tensor | None) -> Tensor | None:
    """The rows H (h, d_in) for which C + HᵀH is what the metric is built from; None: C alone."""
    if held is None or not len(held) or not config.held_weight:
        return None
    if not all_finite(held):
        raise GuardError(
            "The keys of the templates' own tokens are not finite: the model overflows there. Load it in float32 or "
            "bfloat16."
        )
    rows: Tensor = held.to(second_moment) * math.sqrt(config.held_weight / len(held))
    return rows


def _cholesky(second_moment: Tensor, weight: float, rows: Tensor | None) -> Tensor:
    """Lower factor of weight (C + HᵀH) + I, in float64 where C's precision does not do; one matrix of memory."""
    for dtype in (second_moment.dtype, torch.float64):
        matrix = second_moment.to(dtype).mul(weight)
        if rows is not None:
            matrix.addmm_(rows.to(dtype).T, rows.to(dtype), alpha=weight)
        matrix.diagonal().add_(1.0)
        # Symmetric, so that its transpose is itself in the order that LAPACK overwrites.
        factor, failed = matrix.T, torch.zeros((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if failed == 0:
            return factor.to(second_moment.dtype)
    raise GuardError(
        f"The second moment, times {weight:.3g} and plus one, is not positive definite to its own precision: "
        "lower gamma, or collect the statistics on more text."
    )


def _trace_of_product(second_moment: Tensor, factor: Tensor) -> float:
    """tr(C M) within about a percent, by Hutchinson's estimator: the exact trace needs the whole inverse."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(factor), TRACE_PROBES), generator=generator).to(factor) * 2 - 1
    return float((signs * _solve(factor, second_moment @ signs)).sum() / TRACE_PROBES)


def _solve(factor: Tensor, columns: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ columns; unlike torch.cholesky_solve, without a copy of the factor."""
    halfway = torch.linalg.solve_triangular(factor, columns, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.T, halfway, upper=True)
    return solved


def all_finite(matrix: Tensor) -> bool:
    """Whether all numbers of a large matrix are finite; torch.isfinite would take twice its memory at once."""
    return all(bool(torch.isfinite(rows).all()) for rows in torch.split(matrix, ROWS_AT_ONCE))


def _projected(second_moment: Tensor, threshold: float) -> ProjectedMetric:
    values, vectors = _eigenpairs(second_moment)
    free = int((values < threshold).sum())
    size = len(values)
    if free == 0:
        raise GuardError(
            f"No direction is free: all {size} eigenvalues of the second moment are at least {threshold:.3g} "
            f"(the smallest is {float(values[0]):.3g}), so the edit would be zero. Raise the threshold."
        )
    ordinary = float(values[:free].clamp(min=0).sum())
    if free <= size // 2:
        return ProjectedMetric(vectors[:, :free].contiguous(), protected=False, ordinary=ordinary)
    return ProjectedMetric(vectors[:, free:].contiguous(), protected=True, ordinary=ordinary)


def _eigenpairs(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors in columns; in float64 where float32 does not do.

    LAPACK raises on some ill-conditioned matrices; cuSOLVER may return without a word what are no eigenvectors
    (pytorch issues 94772 and 105359).
    """
    for dtype in (second_moment.dtype, torch.float64):
        matrix = second_moment.to(dtype)
        try:
            values, vectors = torch.linalg.eigh(matrix)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # torch.linalg.LinAlgError among them
            continue
        if _are_eigenpairs(matrix, values, vectors):
            return values.to(second_moment.dtype), vectors.to(second_moment.dtype)
    raise GuardError(
        f"The eigenvectors of the second moment ({len(second_moment)} x {len(second_moment)}) could not be computed, "
        "in float64 either: use the method 'whitened', or collect the statistics on more text."
    )


def _are_eigenpairs(matrix: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Whether V Λ Vᵀ x is the matrix times x, and V Vᵀ x is x, for some vectors x."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(matrix), EIGEN_PROBES, generator=generator, dtype=torch.float64).to(matrix)
    coordinates = vectors.T @ probes
    product_error = (matrix @ probes - vectors @ (values[:, None] * coordinates)).norm()
    probe_error = (probes - vectors @ coordinates).norm()
    bound = torch.finfo(matrix.dtype).eps ** 0.5 * probes.norm()
    return bool(product_error <= bound * values.abs().max()) and bool(probe_error <= bound)
