"""The metric M, which weakens or removes what a key shares with ordinary keys, to protect them from an update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rocr.config import EditConfig
from rocr.errors import GuardError
from rocr.ops.system import Metric, all_finite

TRACE_PROBES = 64
"""Number of random vectors of the estimator of a trace."""
EIGEN_PROBES = 4
"""Number of random vectors that an eigendecomposition is checked with."""


class FactoredMetric(Metric, Protocol):
    """A metric M with a factor B, M = B Bᵀ, and with the mean length of ordinary keys under it."""

    def root(self, keys: Tensor) -> Tensor:
        """Return keys @ B, (n, d_in), for keys (n, d_in)."""
        ...

    def root_transposed(self, rows: Tensor) -> Tensor:
        """Return rows @ Bᵀ, (m, d_in), for rows (m, d_in)."""
        ...

    @property
    def ordinary(self) -> float:
        """Mean squared length of ordinary keys under the metric, tr(C M): the unit of a relative ridge."""
        ...

    def describe(self) -> str:
        """Return a short description for reports."""
        ...


@dataclass(frozen=True)
class WhitenedMetric:
    """M = (γ C / mean(diag C) + I)⁻¹, as in ROME (arXiv 2202.05262, eq. 2) and MEMIT, with the identity as floor.

    Attributes:
        factor: (d_in, d_in) lower Cholesky factor L of M⁻¹.
        gamma: γ, the weight of ordinary keys.
        ordinary: Estimate of tr(C M).
    """

    factor: Tensor
    gamma: float
    ordinary: float

    def apply(self, keys: Tensor) -> Tensor:
        """Return keys @ M, by two triangular solves."""
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
        """Return the method and γ."""
        return f"whitened, γ = {self.gamma:g}"


@dataclass(frozen=True)
class ProjectedMetric:
    """M = P, the projector on the eigenvectors of C below a threshold (ROCR, arXiv 2506.07795, and AlphaEdit).

    P is not computed; the smaller of the bases of the free and of the protected directions is stored.

    Attributes:
        basis: U (d_in, r), with orthonormal columns.
        protected: Whether U spans the protected directions (P = I - UUᵀ) or the free ones (P = UUᵀ).
        ordinary: tr(C P), the sum of the free eigenvalues.
    """

    basis: Tensor
    protected: bool
    ordinary: float

    def apply(self, keys: Tensor) -> Tensor:
        """Return keys @ P."""
        keys = keys.to(self.basis)
        if self.free_directions == 0:
            return torch.zeros_like(keys)
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
        """Return the method and the number of directions that are free for the update."""
        if self.free_directions == self.basis.shape[0]:
            return f"projected, all {self.free_directions} directions free: ordinary keys are not protected"
        return f"projected, {self.free_directions} of {self.basis.shape[0]} directions free"


def build_metric(
    second_moment: Tensor,
    config: EditConfig,
    template_keys: Tensor | None = None,
    scale: float | None = None,
    density: float = 1.0,
) -> WhitenedMetric | ProjectedMetric:
    """Build the metric of the settings from the mean second moment of ordinary keys.

    Args:
        second_moment: C = sum(k kᵀ) / tokens, (d_in, d_in), symmetric, float32 or float64.
        config: The settings; method, gamma, threshold, relative_threshold and template_weight are used.
        template_keys: (h, d_in) keys of the templates' own tokens, which are protected too, with the weight
            `config.template_weight`. None protects only ordinary keys.
        scale: mean(diag C), where C is a block of a larger second moment. None is that of C itself.
        density: Share of the weight that is not zero, if an update keeps its zeros: for "whitened", p C +
            (1 - p) diag(C) then takes the place of C (`rocr.solve.support`).

    Raises:
        GuardError: C is zero or not finite, template keys are not finite, M⁻¹ is not positive definite because of
            rounding, or no eigenvalue of C lies below the threshold and C is not a block.
    """
    is_block = scale is not None
    scale = float(second_moment.diagonal().mean()) if scale is None else scale
    if not all_finite(second_moment) or scale <= 0:
        raise GuardError(
            "The second moment of ordinary keys is not finite or zero: collect the statistics again, on ordinary text."
        )
    rows = _template_rows(second_moment, config, template_keys)
    if config.method == "whitened":
        factor = _cholesky(second_moment, config.gamma / scale, rows, density)
        return WhitenedMetric(factor, config.gamma, _trace_of_product(second_moment, factor, density))
    if rows is not None:
        second_moment = torch.addmm(second_moment, rows.T, rows)
    threshold = config.threshold * scale if config.relative_threshold else config.threshold
    return _projected(second_moment, threshold, may_be_zero=is_block)


def _template_rows(second_moment: Tensor, config: EditConfig, keys: Tensor | None) -> Tensor | None:
    """Return the rows H (h, d_in) for which C + HᵀH takes the place of C; None for C itself."""
    if keys is None or not len(keys) or not config.template_weight:
        return None
    if not all_finite(keys):
        raise GuardError(
            "The keys of the templates' own tokens are not finite: the model overflows there. Load it in float32 or "
            "bfloat16."
        )
    rows: Tensor = keys.to(second_moment) * math.sqrt(config.template_weight / len(keys))
    return rows


def _cholesky(second_moment: Tensor, weight: float, rows: Tensor | None, density: float) -> Tensor:
    """Return the lower Cholesky factor of weight (C + HᵀH) + I, computed in place in one matrix.

    The elements outside the diagonal of C + HᵀH are multiplied by the density.

    The factorisation is repeated in float64 if it fails in the precision of C.
    """
    for dtype in (second_moment.dtype, torch.float64):
        matrix = second_moment.to(dtype).mul(weight)
        if rows is not None:
            matrix.addmm_(rows.to(dtype).T, rows.to(dtype), alpha=weight)
        if density < 1.0:
            diagonal = matrix.diagonal().clone()
            matrix.mul_(density).diagonal().copy_(diagonal)
        matrix.diagonal().add_(1.0)
        # LAPACK overwrites column-major matrices, and the matrix is symmetric.
        factor, failed = matrix.T, torch.zeros((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if failed == 0:
            return factor.to(second_moment.dtype)
    raise GuardError(
        f"The matrix {weight:.3g} C + I of the second moment C is not positive definite to its own precision: "
        "lower gamma, or collect the statistics on more text."
    )


def _trace_of_product(second_moment: Tensor, factor: Tensor, density: float) -> float:
    """Return tr(C M) to about 1%, by Hutchinson's estimator; the exact trace would need the inverse of M⁻¹.

    The elements of C outside its diagonal are multiplied by the density.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(factor), TRACE_PROBES), generator=generator).to(factor) * 2 - 1
    product = second_moment @ signs
    if density < 1.0:
        product = density * product + (1.0 - density) * second_moment.diagonal()[:, None] * signs
    return float((signs * _solve(factor, product)).sum() / TRACE_PROBES)


def _solve(factor: Tensor, columns: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ columns, without the copy of the factor that torch.cholesky_solve makes."""
    halfway = torch.linalg.solve_triangular(factor, columns, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.T, halfway, upper=True)
    return solved


def _projected(second_moment: Tensor, threshold: float, may_be_zero: bool = False) -> ProjectedMetric:
    """Return the projector on the eigenvectors of the second moment with an eigenvalue below the threshold."""
    values, vectors = _eigenpairs(second_moment)
    free = int((values < threshold).sum())
    size = len(values)
    if free == 0 and not may_be_zero:
        raise GuardError(
            f"No direction is free: all {size} eigenvalues of the second moment are at least {threshold:.3g} "
            f"(the smallest is {float(values[0]):.3g}), so the edit would be zero. Raise the threshold."
        )
    ordinary = float(values[:free].clamp(min=0).sum())
    if 0 < free <= size // 2:
        return ProjectedMetric(vectors[:, :free].contiguous(), protected=False, ordinary=ordinary)
    return ProjectedMetric(vectors[:, free:].contiguous(), protected=True, ordinary=ordinary)


def _eigenpairs(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and the eigenvectors in columns.

    The decomposition is repeated in float64 if it fails. LAPACK raises an error for some ill-conditioned matrices;
    cuSOLVER may return wrong eigenvectors without an error (pytorch issues 94772 and 105359).
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
    """Return whether V Λ Vᵀ x is the matrix times x, and V Vᵀ x is x, for random vectors x."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(matrix), EIGEN_PROBES, generator=generator, dtype=torch.float64).to(matrix)
    coordinates = vectors.T @ probes
    product_error = (matrix @ probes - vectors @ (values[:, None] * coordinates)).norm()
    probe_error = (probes - vectors @ coordinates).norm()
    bound = torch.finfo(matrix.dtype).eps ** 0.5 * probes.norm()
    return bool(product_error <= bound * values.abs().max()) and bool(probe_error <= bound)
