"""Solve the update of one layer from keys, residuals and metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.concepts import Concept
from rocr.errors import GuardError
from rocr.ops.system import FactoredGram, factor_gram, solve_by_factor, solve_weighted
from rocr.solve.factors import Factors
from rocr.solve.metric import FactoredMetric
from rocr.solve.mixture import WeighedKeys
from rocr.solve.support import solve_supported

CHUNK_ROWS = 4096
"""Number of keys that are converted to float64 at a time."""
EXACT_CONDITION_SIZE = 512
"""Maximum size of a system whose condition number is computed by its eigenvalues."""
CONDITION_STEPS = 50
"""Number of steps of the power iteration for larger systems."""


@dataclass(frozen=True)
class RetainedRows:
    """The rows of a system whose residual is 0: the keys of names whose outputs an update keeps.

    Attributes:
        keys: H (h, d_in) float32, each key times the root of its weight.
        product: H M (h, d_in) float32. None if the system has the metric.
    """

    keys: Tensor
    product: Tensor | None = None

    def of(self, rows: Tensor) -> RetainedRows:
        """Return some of the rows, given by a mask (h,) or indices."""
        return RetainedRows(self.keys[rows], None if self.product is None else self.product[rows])

    def joined(self, other: RetainedRows) -> RetainedRows:
        """Return these rows followed by others; with a product if both have one."""
        keys = torch.cat([self.keys, other.keys.to(self.keys)])
        if self.product is None or other.product is None:
            return RetainedRows(keys)
        return RetainedRows(keys, torch.cat([self.product, other.product.to(self.product)]))


@dataclass(frozen=True)
class System:
    """The part of a system that is needed to solve an update again for other keys, without the statistics.

    Attributes:
        ridge: λ > 0, in units of a squared key.
        product: K M (n, d_in) float32, one row for each key, if n <= d_in.
        metric: M, if n > d_in; it is then smaller than K M.
        retained: The rows of retained names. None if there are none.
        support: (d_out, d_in) bool, where the weight is not zero, if the update keeps its zeros; the system then has
            a product.
    """

    ridge: float
    product: Tensor | None = None
    metric: FactoredMetric | None = None
    retained: RetainedRows | None = None
    support: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """An update and the system that it was solved from.

    Attributes:
        factors: The update Δ (d_out, d_in), as a product of inner size n if n <= d_in, otherwise as one matrix.
        condition: Condition number of K M Kᵀ + λI if n <= d_in, otherwise of Bᵀ Kᵀ K B + λI with M = B Bᵀ, which has
            the same eigenvalues except λ itself. It is an estimate if the system has more than 512 rows.
        system: The part of the system that is needed to solve the update again.
        factor: Lower Cholesky factor (d_in, d_in) float64 of Bᵀ Kᵀ K B + λI, if n > d_in.
        expected: As of `SupportedUpdate`, for the n keys, if the update keeps zeros.
    """

    factors: Factors
    condition: float
    system: System
    factor: Tensor | None = None
    expected: Tensor | None = None

    @property
    def ridge(self) -> float:
        """λ, in units of a squared key."""
        return self.system.ridge

    def coefficients(self, keys: Tensor, at: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the coefficients a = (K M Kᵀ + λI)⁻¹ K M k of other keys k.

        The change of the output at k is residualsᵀ a. For an update that keeps zeros, it is the mean over supports.

        Args:
            keys: K (n, d_in), the keys that the update was solved for.
            at: The other keys k, (m, d_in).

        Returns:
            A function that takes indices of rows of K and returns these rows of a, (rows, m).
        """
        if self.factor is None:
            right = self.factors.right if self.expected is None else self.expected
            return lambda rows: right[rows] @ at.to(right).T
        # By the push-through identity, a = K B (Bᵀ Kᵀ K B + λI)⁻¹ Bᵀ k.
        metric = self.system.metric
        assert metric is not None, "a system of more keys than inputs contains its metric"
        response = torch.cholesky_solve(metric.root(at).double().T, self.factor)
        return lambda rows: metric.root(keys[rows]).double() @ response


def solve_layer(
    keys: Tensor,
    residuals: Tensor,
    metric: FactoredMetric | WeighedKeys,
    ridge: float,
    retained: Tensor | None = None,
    used: Tensor | None = None,
    support: Tensor | None = None,
) -> Solution:
    """Solve the update Δ = Rᵀ (K M Kᵀ + λI)⁻¹ K M of one layer.

    With retained keys H, K is [K; H] and R is [R; 0] there: Δ minimises |K Δᵀ − R|² + |H Δᵀ|² + λ tr(Δ M⁻¹ Δᵀ).

    Args:
        keys: K (n, d_in) float32.
        residuals: R (n, d_out) float32.
        metric: M; or the product of the keys, followed by the retained ones, with M, for a mixture of experts.
        ridge: λ > 0, in units of a squared key.
        retained: H (h, d_in) float32, the keys of retained names times the root of their weight. None for none.
        used: (h,) mask of the rows of H that take part in the solve. None for all.
        support: (d_out, d_in) bool, where the weight is not zero, to keep its zeros (`rocr.solve.support`). None
            does not keep them.

    Raises:
        GuardError: The system is not finite, or is singular to working precision.

    Source:
        Ye, Zhang and Wu, arXiv 2506.07795. The authors solve a (d_in, d_in) system (Acruxos/ORT); this is the same
        update by the push-through identity.
    """
    n = len(keys)
    if isinstance(metric, WeighedKeys):
        rows = None if retained is None else RetainedRows(retained, metric.product[n:])
        system = System(ridge, product=metric.product[:n], retained=rows, support=support)
    elif n > keys.shape[1] and support is None:
        system = System(ridge, metric=metric, retained=None if retained is None else RetainedRows(retained))
    else:
        rows = None if retained is None else RetainedRows(retained, metric.apply(retained).float())
        system = System(ridge, product=metric.apply(keys).float(), retained=rows, support=support)
    return solve_again(keys, residuals, system, used)


def solve_again(keys: Tensor, residuals: Tensor, system: System, used: Tensor | None = None) -> Solution:
    """Solve an update from a stored system.

    Args:
        keys: K (n, d_in) float32, the keys of the rows of `system.product`.
        residuals: R (n, d_out) float32.
        system: K M or M, λ and the rows of retained names.
        used: (h,) mask of the rows of retained names that take part in the solve. None for all.

    Raises:
        GuardError: The system is not finite, or is singular to working precision.
    """
    retained = system.retained if used is None or system.retained is None else system.retained.of(used)
    if system.metric is not None:
        return _solve_wide(keys, residuals, system.metric, system, retained)
    assert system.product is not None, "a system contains a product or a metric"
    n, product = len(keys), system.product
    if retained is not None and len(retained.keys):
        assert retained.product is not None, "a system with a product has the products of all of its rows"
        keys = torch.cat([keys, retained.keys.to(keys)])
        residuals = torch.cat([residuals, residuals.new_zeros(len(retained.keys), residuals.shape[1])])
        product = torch.cat([product, retained.product.to(product)])
    if system.support is not None:
        found = solve_supported(keys, residuals, product, system.ridge, system.support)
        return Solution(found.factors, found.condition, system, expected=found.expected[:n])
    left, right, solved = solve_weighted(keys, residuals, product, system.ridge)
    if len(keys) == n:
        return Solution(Factors(left, right), _condition(solved, system.ridge), system)
    # The columns of left for residuals of 0 are 0.
    factors = Factors(left[:, :n].contiguous(), right[:n].contiguous())
    return Solution(factors, _condition(solved, system.ridge), system)


def _solve_wide(
    keys: Tensor, residuals: Tensor, metric: FactoredMetric, system: System, retained: RetainedRows | None
) -> Solution:
    """Solve the same update as a (d_in, d_in) system: Δ = Rᵀ G (GᵀG + λI)⁻¹ Bᵀ with G = K B, M = B Bᵀ.

    It needs the memory of one (d_in, d_in) and one (d_out, d_in) float64 matrix and of a chunk of rows, for any number
    of keys.
    """
    d_in, d_out = keys.shape[1], residuals.shape[1]
    moment = torch.zeros(d_in, d_in, dtype=torch.float64, device=keys.device)
    cross = torch.zeros(d_out, d_in, dtype=torch.float64, device=keys.device)
    for start in range(0, len(keys), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        reduced = metric.root(keys[rows]).double()
        moment.addmm_(reduced.T, reduced)
        cross.addmm_(residuals[rows].double().T, reduced)
    if retained is not None:
        reduced = metric.root(retained.keys.to(keys)).double()
        moment.addmm_(reduced.T, reduced)
    solved = factor_gram(moment, system.ridge, len(keys))
    update = metric.root_transposed(solve_by_factor(solved.factor, cross.T).T.float()).float().contiguous()
    return Solution(Factors.of_matrix(update), _condition(solved, system.ridge), system, solved.factor)


def _condition(solved: FactoredGram, ridge: float) -> float:
    """Return the condition number of gram + λI: exact for small systems, otherwise by power iteration."""
    gram, factor = solved.gram, solved.factor
    if len(gram) <= EXACT_CONDITION_SIZE:
        eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0) + ridge
        return float(eigenvalues[-1] / eigenvalues[0])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), 1, dtype=torch.float64, generator=generator).to(gram.device)
    largest, smallest_inverse = start / start.norm(), start / start.norm()
    for _ in range(CONDITION_STEPS):
        high = gram @ largest
        low = torch.cholesky_solve(smallest_inverse, factor)
        high_norm, low_norm = high.norm().clamp(min=1e-300), low.norm()
        largest, smallest_inverse = high / high_norm, low / low_norm
    return float((high_norm + ridge) * low_norm)


def check_finite(what: str, layer: int, values: Tensor, concept_of: Sequence[int], concepts: Sequence[Concept]) -> None:
    """Raise GuardError, naming the concepts, unless all values are finite.

    Args:
        what: The name of the values in the message, such as "keys".
        layer: The decoder layer at which they were read.
        values: (n, features), one row for each key.
        concept_of: For each row, the index of its concept.
        concepts: The concepts.
    """
    bad = (~torch.isfinite(values).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        names = list(dict.fromkeys(concepts[concept_of[row]].name for row in bad))
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise GuardError(
            f"The {what} at layer {layer} are not finite for {shown}: the model overflows there. "
            "The model is unchanged; load it in float32 or bfloat16."
        )
