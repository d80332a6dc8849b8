"""The update of each row of a sparse weight on its own support, in Triton.

Formula, for a row of the weight W [rows, columns] with the support s (1 where W is not zero), keys K [n, columns], a
basis F [m, columns] and the residuals r [n] of the row, float32:

    A[a, b] = sum over j of s[j] * K[a, j] * F[b, j]
    z       = Aᵀ (A Aᵀ + ridge I)⁻¹ r

sum_on_support computes A for all rows as a product of the support with products of elements of K and F. A pair is an
element (a, b) of A; pairs are numbered with b as the faster one:

                               pairs [COLUMNS, PAIRS]   products K[a, j] * F[b, j], made for each tile
                                 |
    support [ROWS, COLUMNS] --- A [ROWS, PAIRS]         summed over the columns, a program for each tile

A support is exact in bfloat16, and a product is split into three bfloat16 terms (_common.py), which lose nothing of its
float32 value. Each step's sum is added to the total outside of the tensor cores, which would truncate it.

solve_rows factors A Aᵀ + ridge I in float64, for up to MAX_SIZE keys and rows of the basis: a program holds the systems
of some rows, and eliminates one key after the other without pivoting, as a symmetric positive definite system allows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rocr_kernels._common import backend_of, dot, opaque, split_bf16, to_bfloat16
from torch import Tensor

MAX_SIZE = 16
"""Largest number of keys, and of rows of the basis, of the systems of solve_rows."""

SYSTEM_ELEMENTS = 2048
"""Elements of the systems of a program: 16 float64 numbers for each of its threads."""

TILE_ROWS, TILE_PAIRS, TILE_COLUMNS = 32, 64, 32
"""A tile of A, and the columns that a step sums: 4096 rows with up to 64 pairs are 128 programs."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
MAGNITUDES = {1: 0xFF, 2: 0x7FFF, 4: 0x7FFFFFFF}
"""By the bytes of an element: the integers that it is read as, and all of their bits but the sign of a number."""


@triton.jit
def sum_on_support(
    weight,
    keys,
    basis,
    products,
    rows,
    columns,
    weight_stride,
    basis_size,
    pairs,
    MAGNITUDE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Write A of each row, products [rows, pairs]. keys and basis are contiguous."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    weights = weight + row.to(tl.int64)[:, None] * weight_stride
    lefts = keys + (pair // basis_size).to(tl.int64)[:, None] * columns
    rights = basis + (pair % basis_size).to(tl.int64)[:, None] * columns
    total = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    for first in tl.range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        bits = tl.load(weights + column, mask=(row < rows)[:, None] & (column < columns), other=0)
        support = to_bfloat16(((bits & MAGNITUDE) != 0).to(tl.float32), BACKEND)
        inside = (pair < pairs)[:, None] & (column < columns)
        left = tl.load(lefts + column, mask=inside, other=0.0)
        right = tl.load(rights + column, mask=inside, other=0.0)
        high, middle, low = split_bf16(left * right, 3, BACKEND)
        of_step = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
        of_step = dot(support, low.T, of_step, BACKEND)
        of_step = dot(support, middle.T, of_step, BACKEND)
        of_step = dot(support, high.T, of_step, BACKEND)
        total = total + opaque(of_step, BACKEND)
    target = products + row.to(tl.int64)[:, None] * pairs + pair[None, :]
    tl.store(target, total, mask=(row < rows)[:, None] & (pair < pairs)[None, :])


@triton.jit
def solve_rows(
    products,
    residuals,
    coefficients,
    failed,
    rows,
    keys,
    basis_size,
    ridge,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BASIS: tl.constexpr,
):
    """Write the coefficients [rows, basis_size] and whether a pivot of a row's system is not positive."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    element = tl.arange(0, BASIS)
    wide = row.to(tl.int64)
    offsets = (wide[:, None, None] * keys + key[None, :, None]) * basis_size + element[None, None, :]
    inside = (row < rows)[:, None, None] & (key < keys)[None, :, None] & (element < basis_size)[None, None, :]
    left = tl.load(products + offsets, mask=inside, other=0.0).to(tl.float64)
    identity = tl.where(key[:, None] == key[None, :], 1.0, 0.0).to(tl.float64)
    system = tl.zeros((ROWS, KEYS, KEYS), dtype=tl.float64) + (identity * ridge)[None, :, :]
    for index in tl.range(0, BASIS):
        of_element = tl.sum(tl.where(element[None, None, :] == index, left, 0.0), axis=2)
        system += of_element[:, :, None] * of_element[:, None, :]
    own = wide[:, None] * keys + key[None, :]
    held = (row < rows)[:, None] & (key < keys)[None, :]
    solution = tl.load(residuals + own, mask=held, other=0.0).to(tl.float64)
    solved = row >= 0
    for index in tl.range(0, KEYS):
        pivots = tl.sum(tl.where(key[None, :, None] == index, system, 0.0), axis=1)
        pivot = tl.sum(tl.where(key[None, :] == index, pivots, 0.0), axis=1)
        solved = solved & (pivot > 0.0)
        below = tl.sum(tl.where(key[None, None, :] == index, system, 0.0), axis=2)
        factor = tl.where(key[None, :] == index, 0.0, below / pivot[:, None])
        system -= factor[:, :, None] * pivots[:, None, :]
        goal = tl.sum(tl.where(key[None, :] == index, solution, 0.0), axis=1)
        solution -= factor * goal[:, None]
    diagonal = tl.sum(system * identity[None, :, :], axis=2)
    result = tl.sum(left * (solution / diagonal)[:, :, None], axis=1)
    targets = coefficients + wide[:, None] * basis_size + element[None, :]
    tl.store(targets, result.to(tl.float32), mask=(row < rows)[:, None] & (element < basis_size)[None, :])
    tl.store(failed + row, tl.where(solved, 0, 1), mask=row < rows)


def products_on_support(weight: Tensor, keys: Tensor, basis: Tensor) -> Tensor:
    """Return A of each row of a weight, (rows, n, m) float32.

    Args:
        weight: (rows, columns) bool, float32, bfloat16 or float16, with unit stride along a row.
        keys: (n, columns) float32, contiguous.
        basis: (m, columns) float32, contiguous.

    Raises:
        ValueError: strides that the kernel does not take.
    """
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"A weight has the strides {weight.stride()}, but the second must be 1.")
    products = keys.new_empty(len(weight), len(keys), len(basis))
    pairs, bytes_of_element = len(keys) * len(basis), weight.element_size()
    sum_on_support[(-(-pairs // TILE_PAIRS), -(-len(weight) // TILE_ROWS))](
        weight.view(BITS[bytes_of_element]),
        keys,
        basis,
        products,
        *weight.shape,
        weight.stride(0),
        len(basis),
        pairs,
        MAGNITUDE=MAGNITUDES[bytes_of_element],
        ROWS=TILE_ROWS,
        PAIRS=TILE_PAIRS,
        COLUMNS=TILE_COLUMNS,
        BACKEND=backend_of(weight.device),
        num_warps=4,
    )
    return products


def solve_products(products: Tensor, residuals: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Solve the systems of rows with up to MAX_SIZE keys and rows of the basis.

    Args:
        products: A (rows, n, m) float32, contiguous.
        residuals: (rows, n) float32, contiguous.
        ridge: λ > 0.

    Returns:
        The coefficients (rows, m) float32, and (rows,) int32: 1 where a system could not be solved.
    """
    rows, keys, basis_size = products.shape
    sizes = [triton.next_power_of_2(size) for size in (keys, basis_size)]
    coefficients = products.new_empty(rows, basis_size)
    failed = torch.empty(rows, dtype=torch.int32, device=products.device)
    program_rows = max(1, SYSTEM_ELEMENTS // (sizes[0] * max(sizes)))
    solve_rows[(-(-rows // program_rows),)](
        products,
        residuals,
        coefficients,
        failed,
        rows,
        keys,
        basis_size,
        ridge,
        ROWS=program_rows,
        KEYS=sizes[0],
        BASIS=sizes[1],
        num_warps=4,
    )
    return coefficients, failed
