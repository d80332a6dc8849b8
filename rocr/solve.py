"""Solve one layer's update from keys, residuals and metric, refusing what is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr import ops
from rocr.concepts import Concept
from rocr.errors import GuardError
from rocr.metric import Metric


@dataclass(frozen=True)
class Solution:
    """An update and the system it came from.

    Attributes:
        left: (d_out, n) float32.
        right: (n, d_in) float32; the update is left @ right.
        condition: condition number of K M Kᵀ + λI.
        ridge: λ, in squared key units.
    """

    left: Tensor
    right: Tensor
    condition: float
    ridge: float


@dataclass(frozen=True)
class _AppliedMetric:
    """A metric whose product with the keys at hand is known."""

    product: Tensor

    def apply(self, keys: Tensor) -> Tensor:
        return self.product


def solve_layer(keys: Tensor, residuals: Tensor, metric: Metric, ridge: float) -> Solution:
    """Solve Δ = residualsᵀ (K M Kᵀ + λI)⁻¹ K M.

    Args:
        keys: K, (n, d_in) float32.
        residuals: (n, d_out) float32.
        metric: M.
        ridge: λ > 0.

    Raises:
        GuardError: the Gram matrix is not finite.
    """
    product = metric.apply(keys)
    gram = keys.double() @ product.double().T
    if not torch.isfinite(gram).all():
        raise GuardError("The Gram matrix of the keys is not finite; nothing was changed.")
    eigenvalues = torch.linalg.eigvalsh((gram + gram.T) / 2).clamp(min=0) + ridge
    left, right = ops.solve_update(keys, residuals, _AppliedMetric(product), ridge)
    return Solution(left, right, float(eigenvalues[-1] / eigenvalues[0]), ridge)


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
