"""The operations in torch, for all devices and without compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rocr.ops.rounding import round_into
from rocr.ops.system import require_solvable

MAXIMUM_TOKENS = 8192
"""Maximum number of tokens that a float32 accumulator sums before it is added to the total."""

PANEL_ROWS = 384
"""Number of rows of the lower triangle for each product, a compromise between wasted work and small products."""

CUDA_PANEL_ROWS = 2048
"""Number of rows for each product on a GPU, which needs larger products."""

OLDEST_WIDE_PRODUCT = (2, 10)
"""First version of torch whose addmm(out_dtype=) adds 16-bit products to a float32 matrix; CUDA only."""

BLOCK_ELEMENTS = 1 << 24
"""Number of elements of a weight that are converted to float32 at a time (64 MiB)."""


def is_available(device: torch.device) -> bool:
    """Return True: this backend runs on all devices."""
    return True


def accumulate_second_moment(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the lower triangle of total, panel by panel.

    The products are computed in float32, or on CUDA from 16-bit keys with float32 accumulation in cuBLAS.
    """
    panel_rows = CUDA_PANEL_ROWS if total.is_cuda else PANEL_ROWS
    for first in range(0, keys.shape[0], MAXIMUM_TOKENS):
        tokens = keys[first : first + MAXIMUM_TOKENS]
        tokens = tokens if multiplies_in_16_bits(keys) else tokens.float()
        for start in range(0, total.shape[0], panel_rows):
            rows = slice(start, min(start + panel_rows, total.shape[0]))
            panel = tokens[:, rows]
            _add_product(total[rows, :start], panel, tokens[:, :start])
            square = total[rows, rows]
            is_lower = torch.ones_like(square, dtype=torch.bool).tril_()
            # The bits above the diagonal must not change; adding 0 would change -0.0 and signalling NaNs.
            square.copy_(torch.where(is_lower, square + _product(panel, panel), square))


def accumulate_grouped_second_moment(totals: Tensor, keys: Tensor, offsets: Sequence[int]) -> None:
    """Add the second moment of rows offsets[e] to offsets[e + 1] of keys to the lower triangle of totals[e]."""
    for total, start, end in zip(totals, offsets, offsets[1:], strict=False):
        if end > start:
            accumulate_second_moment(total, keys[start:end])


def multiplies_in_16_bits(keys: Tensor) -> bool:
    """Return whether torch can accumulate products of these keys in float32 without converting them."""
    if torch.version.hip:
        return False  # versions of ROCm differ in whether they have this product
    version = torch.__version__.split(".")
    return keys.is_cuda and keys.dtype != torch.float32 and (int(version[0]), int(version[1])) >= OLDEST_WIDE_PRODUCT


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype == torch.float32:
        return left.T @ right
    return torch.mm(left.T, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    elif total.numel():
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)


def low_rank_update(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    scale: float,
    rounding: str,
    seed: int,
    keep_zeros: bool = False,
) -> None:
    """Add scale * left @ right to every weight in float32, rounded once, in blocks of rows.

    With `keep_zeros`, elements of a weight that are zero keep their bits.
    """
    # Created only if it is used, since a seed cannot be set during the capture of a CUDA graph.
    draws = rounding == "stochastic" and len(weights) > 0
    generator = torch.Generator(weights[0].device).manual_seed(seed) if draws else None
    for weight, left, right in zip(weights, lefts, rights, strict=True):
        block_rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], block_rows):
            block = weight[start : start + block_rows]
            exact = torch.addmm(block.float(), left[start : start + block_rows], right, alpha=scale)
            if not keep_zeros:
                round_into(block, exact, rounding, generator)
                continue
            rounded = block.clone()
            round_into(rounded, exact, rounding, generator)
            block.copy_(torch.where(block == 0, block, rounded))


def solve_on_support(weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Return the coefficients (d_out, m) of each row, some rows at a time."""
    coefficients = basis.new_empty(len(weight), len(basis))
    step = max(1, BLOCK_ELEMENTS // max(weight.shape[1], len(keys) * len(basis)))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        products = products_on_support(weight[rows], keys, basis)
        coefficients[rows] = solve_products(products, residuals[:, rows].T, ridge)
    return coefficients


def products_on_support(weight: Tensor, keys: Tensor, basis: Tensor) -> Tensor:
    """Return A_i = K D_i Fᵀ of each row of a weight (rows, d_in): (rows, n, m) float32."""
    support = (weight != 0).float()
    found = support.new_empty(len(weight), len(keys), len(basis))
    step = max(1, BLOCK_ELEMENTS // basis.numel())
    for start in range(0, len(keys), step):
        some = keys[start : start + step]
        pairs = (some[:, None] * basis).flatten(0, 1)  # the products of one element of a key and one of the basis
        found[:, start : start + step] = (support @ pairs.T).view(-1, len(some), len(basis))
    return found


def solve_products(products: Tensor, residuals: Tensor, ridge: float) -> Tensor:
    """Return A_iᵀ (A_i A_iᵀ + λI)⁻¹ r_i for A (rows, n, m) and residuals (rows, n): (rows, m), in float64.

    Raises:
        GuardError: A system is singular to working precision.
    """
    products, goals = products.double(), residuals.double()[..., None]
    systems = products @ products.mT
    systems.diagonal(dim1=1, dim2=2).add_(ridge)
    factors, failed = torch.linalg.cholesky_ex(systems)
    require_solvable(failed.any(), ridge)
    return (products.mT @ torch.cholesky_solve(goals, factors))[..., 0]
