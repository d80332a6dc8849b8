"""Solve the update of a sparse weight so that its zeros stay zero: each row on its own support.

A row w of a sparse weight has a support, the columns in which it is not zero; D is the diagonal matrix of zeros and
ones that selects them. The dense update of the row is the minimiser of

    ‖K δ - r‖² + λ δᵀ M⁻¹ δ,    M⁻¹ = γ C / mean(diag C) + I,                                                      (1)

which is δ = M Kᵀ (K M Kᵀ + λI)⁻¹ r. Restricted to δ = D δ, the exact minimiser needs the inverse of the part of M⁻¹ on
the support, a system of the size of the support for each row: for 4096 rows of 14336 inputs that is 5e14
multiplications. Two steps replace it by one (n, n) system for each row.

1. The penalty is replaced by its mean over supports. For a support that is drawn at random, each column with the
   probability p, δ = D u has the mean penalty

       E[uᵀ D M⁻¹ D u] = p uᵀ M̃⁻¹ u,    M̃⁻¹ = γ C̃ / mean(diag C) + I,    C̃ = p C + (1 - p) diag(C).                (2)

   The elements of C outside its diagonal protect an ordinary key by sums over columns in which terms cancel. Where
   columns are missing they cancel less; C̃ counts on that part of them that is left. p is the share of the weight that
   is not zero. M̃ is the metric of a second moment as any other, so that a relative ridge, tr(C̃ M̃), is the mean
   squared length of an ordinary key in (4).

2. The row is δ = D u with u in the space of the rows of B = K M̃, in which the minimiser of (1) lies if M is M̃ and D is
   I. Without restriction, u = Bᵀ c has the penalty p cᵀ G c with G = K M̃ Kᵀ. In the coordinates z = (pG)^½ c, with the
   basis F = (pG)^-½ B, it is ‖z‖². So z minimises

       ‖A z - r‖² + λ ‖z‖²,    A = K D Fᵀ,                                                                        (3)
       z = Aᵀ (A Aᵀ + λI)⁻¹ r,    δ = D Fᵀ z,                                                                     (4)

   a least squares problem for each row, whose (n, n) system is symmetric positive definite for any support.

For a full support p is 1, M̃ is M, F is G^-½ K M and A is G^½; then (4) is δ = M Kᵀ (G + λI)⁻¹ r, the dense update. The
ends of the approximation are two: the mean of the penalty, and the space of u. A small example of both is in
tests/numerics/test_support.py, against the exact minimiser on the support.

The projector of `projected` has no inverse. It stays as it is, from C; G = K P Kᵀ then is the length of the part of a
key that is free, and (3) and (4) hold with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rocr import ops
from rocr.errors import InputError
from rocr.ops.system import factor_gram, solve_by_factor
from rocr.solve.factors import Factors

MAX_ROWS = 2048
"""Largest number of rows of the system of a sparse weight: each row of the weight has a system of its own."""
CONDITION_ROWS = 16
"""Number of rows of a weight whose condition numbers are computed."""


@dataclass(frozen=True)
class SupportedUpdate:
    """An update on a support.

    Attributes:
        factors: z (d_out, N) and F (N, d_in), with the support.
        condition: Largest condition number of A Aᵀ + λI over 16 rows of the weight.
        expected: p (p G + λI)⁻¹ K M̃ (N, d_in): its product with another key gives the coefficients of the residuals
            in the mean output there, over supports.
    """

    factors: Factors
    condition: float
    expected: Tensor


def density(support: Tensor | None) -> float:
    """Return the share p of a weight that is not zero; 1 without a support."""
    if support is None or not support.numel():
        return 1.0
    # On a CPU, NumPy counts four times as fast as torch.
    count = support.count_nonzero() if support.is_cuda else np.count_nonzero(support.numpy())
    return int(count) / support.numel()


def described(metric: str, support: Tensor | None) -> str:
    """Return the description of a metric, with the share of zeros that an update keeps."""
    return (
        metric if support is None else f"{metric}; {1 - density(support):.1%} of the weight are zeros, which it keeps"
    )


def solve_supported(keys: Tensor, residuals: Tensor, product: Tensor, ridge: float, support: Tensor) -> SupportedUpdate:
    """Solve the update of each row of a weight on its own support; see the module.

    Args:
        keys: K (N, d_in) float32.
        residuals: R (N, d_out) float32.
        product: B = K M̃ (N, d_in) float32, with the metric of C̃.
        ridge: λ > 0, in units of a squared key.
        support: (d_out, d_in) bool.

    Raises:
        InputError: There are more than `MAX_ROWS` keys.
        GuardError: A system is not finite, or is singular to working precision.
    """
    if len(keys) > MAX_ROWS:
        raise InputError(
            f"The zeros of a weight are kept by a system of {len(keys):,} keys for each of its {len(support):,} rows, "
            f"but at most {MAX_ROWS:,} keys are possible: use a shorter list, fewer keys for each concept, or fill the "
            "zeros (keep_zeros=False, --fill-zeros)."
        )
    share = density(support)
    gram = keys.double() @ product.double().T * share
    solved = factor_gram(gram, ridge, len(keys))
    basis = (_inverse_root(solved.gram) @ product.double()).float().contiguous()
    coefficients = ops.solve_on_support(support, keys, residuals, basis, ridge)
    expected = solve_by_factor(solved.factor, product.double() * share).float()
    condition = _condition(keys, basis, support, ridge)
    return SupportedUpdate(Factors(coefficients, basis, support), condition, expected)


def _inverse_root(gram: Tensor) -> Tensor:
    """Return G^-½ (N, N) float64 of a Gram matrix, without the directions that float32 keys do not resolve."""
    values, vectors = torch.linalg.eigh(gram)
    resolved = values > torch.finfo(torch.float32).eps * values[-1].clamp(min=0)
    roots = torch.where(resolved, values.clamp(min=1e-300).rsqrt(), 0.0)
    root: Tensor = (vectors * roots) @ vectors.T
    return root


def _condition(keys: Tensor, basis: Tensor, support: Tensor, ridge: float) -> float:
    """Return the largest condition number of A Aᵀ + λI over some rows, evenly spaced, of a weight."""
    largest = 1.0
    for row in range(0, len(support), -(-len(support) // CONDITION_ROWS)):
        columns = support[row]
        squares = torch.linalg.svdvals(keys[:, columns].double() @ basis[:, columns].double().T).square()
        largest = max(largest, float((squares[0] + ridge) / (squares[-1] + ridge)))
    return largest
