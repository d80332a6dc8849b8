"""Solve one layer's update from keys, residuals and metric, refusing what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.concepts import Concept
from rocr.errors import GuardError
from rocr.ops.system import FactoredGram, factor_gram, solve, solve_small
from rocr.solve.factors import Factors
from rocr.solve.metric import FactoredMetric

CHUNK_ROWS = 4096
EXACT_CONDITION_SIZE = 512
CONDITION_STEPS = 50


@dataclass(frozen=True)
class System:
    """What an update can be solved from again with other rows of keys and residuals, without statistics.

    Attributes:
        ridge: λ > 0, in squared key units.
        product: K M, (n, d_in) float32, where there are at most as many keys as inputs; its rows belong to the keys.
        metric: M itself where there are more keys than inputs, so that it is the smaller of the two.
    """

    ridge: float
    product: Tensor | None = None
    metric: FactoredMetric | None = None


@dataclass(frozen=True)
class Solution:
    """An update and the system it came from.

    Attributes:
        factors: of the update: its inner size is the number of keys, or where there are more keys than inputs it is
            whole.
        condition: condition number of K M Kᵀ + λI, or of Bᵀ Kᵀ K B + λI (M = B Bᵀ), which has the same largest
            and smallest eigenvalues but for λ itself; estimated where the system has more than 512 rows.
        system: what the update can be solved from again.
        factor: lower Cholesky factor (d_in, d_in) float64 of Bᵀ Kᵀ K B + λI, where there are more keys than inputs.
    """

    factors: Factors
    condition: float
    system: System
    factor: Tensor | None = None

    @property
    def left(self) -> Tensor:
        """(d_out, r) float32."""
        return self.factors.left

    @property
    def right(self) -> Tensor:
        """(r, d_in) float32; the update is left @ right."""
        return self.factors.right

    @property
    def ridge(self) -> float:
        """λ, in squared key units."""
        return self.system.ridge

    def coefficients(self, keys: Tensor, at: Tensor) -> Callable[[Tensor], Tensor]:
        """How the update answers other keys: its move there is residualsᵀ a with a = (K M Kᵀ + λI)⁻¹ K M k.

        Args:
            keys: K, (n, d_in), that the update was solved for.
            at: (m, d_in) the other keys k.

        Returns:
            A function of row numbers of K that gives those rows of a, (rows, m).
        """
        if self.factor is None:
            return lambda rows: self.right[rows] @ at.to(self.right).T
        # The same a, pushed through: K B (Bᵀ Kᵀ K B + λI)⁻¹ Bᵀ k.
        metric = self.system.metric
        assert metric is not None, "a system of more keys than inputs holds its metric"
        response = torch.cholesky_solve(metric.root(at).double().T, self.factor)
        return lambda rows: metric.root(keys[rows]).double() @ response


def solve_layer(keys: Tensor, residuals: Tensor, metric: FactoredMetric, ridge: float) -> Solution:
    """Solve Δ = residualsᵀ (K M Kᵀ + λI)⁻¹ K M.

    Args:
        keys: K, (n, d_in) float32.
        residuals: (n, d_out) float32.
        metric: M.
        ridge: λ > 0.

    Raises:
        GuardError: the system is not finite, or too close to singular.
    """
    if len(keys) > keys.shape[1]:
        return solve_again(keys, residuals, System(ridge, metric=metric))
    return solve_again(keys, residuals, System(ridge, product=metric.apply(keys).float()))


def solve_again(keys: Tensor, residuals: Tensor, system: System) -> Solution:
    """Solve an update from a system that is at hand.

    Args:
        keys: K, (n, d_in) float32, the rows that `system.product` belongs to.
        residuals: (n, d_out) float32.
        system: K M or M, and λ.

    Raises:
        GuardError: the system is not finite, or too close to singular.
    """
    if system.metric is not None:
        return _solve_wide(keys, residuals, system.metric, system)
    assert system.product is not None, "a system holds a product or a metric"
    left, right, solved = solve_small(keys, residuals, system.product, system.ridge)
    return Solution(Factors(left, right), _condition(solved, system.ridge), system)


def _solve_wide(keys: Tensor, residuals: Tensor, metric: FactoredMetric, system: System) -> Solution:
    """The same update as a (d_in, d_in) system: Δ = residualsᵀ G (GᵀG + λI)⁻¹ Bᵀ with G = K B, M = B Bᵀ.

    Memory is two float64 matrices (d_in, d_in) and a chunk of rows, whatever the number of keys.
    """
    d_in, d_out = keys.shape[1], residuals.shape[1]
    moment = torch.zeros(d_in, d_in, dtype=torch.float64, device=keys.device)
    cross = torch.zeros(d_out, d_in, dtype=torch.float64, device=keys.device)
    for start in range(0, len(keys), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        reduced = metric.root(keys[rows]).double()
        moment.addmm_(reduced.T, reduced)
        cross.addmm_(residuals[rows].double().T, reduced)
    solved = factor_gram(moment, system.ridge, len(keys))
    update = metric.root_transposed(solve(solved.factor, cross.T).T.float()).float().contiguous()
    return Solution(Factors.of_matrix(update), _condition(solved, system.ridge), system, solved.factor)


def _condition(solved: FactoredGram, ridge: float) -> float:
    """Condition number of gram + ridge, exact for small systems, else by power iteration from both ends."""
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
    """Refuse values that are not finite, naming the concepts they belong to.

    Args:
        what: what the values are, such as "keys".
        layer: the decoder layer they were read at.
        values: (n, features), a row for each key.
        concept_of: for each row, the index of its concept.
        concepts: the concepts.

    Raises:
        GuardError: some value is not finite.
    """
    bad = (~torch.isfinite(values).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        names = list(dict.fromkeys(concepts[concept_of[row]].name for row in bad))
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise GuardError(
            f"The {what} at layer {layer} are not finite for {shown}: the model overflows there. "
            "Nothing was changed; load it in float32 or bfloat16."
        )
