"""The Triton kernels of sparse weights in Triton's interpreter; test_kernels.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in the child process of test_kernels.py", allow_module_level=True)

import torch
from rocr_kernels import low_rank_update, support_solve
from rocr_kernels.low_rank_update import LowRankPlan
from rocr_kernels.support_solve import MAX_SIZE, products_on_support, solve_products

from rocr.errors import GuardError
from rocr.ops import reference, torch_backend, triton_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
ERROR_OVER_TORCH = 1.25
"""Bound of the error over that of float32 products in torch; measured at most 0.5."""


def operands(rows, columns, n, m, dtype=torch.bfloat16):
    weight = (torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)).to(dtype)
    return weight, torch.randn(n, columns), torch.randn(n, rows), torch.randn(m, columns) / columns**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (37, 70, 5, 7), (33, 40, 16, 16), (9, 50, 20, 17)], ids=str)
def test_each_row_is_the_least_squares_in_float64(dtype, shape):
    given = operands(*shape, dtype)
    exact = reference.solve_on_support(*given, 0.3)
    by_torch = torch_backend.solve_on_support(*given, 0.3)
    found = triton_backend.solve_on_support(*given, 0.3)
    rounding = torch.finfo(torch.float32).eps * exact.norm()
    assert (found - exact).norm() <= ERROR_OVER_TORCH * (by_torch - exact).norm() + rounding


def test_a_weight_within_another_matrix(guarded):
    weight, keys, residuals, basis = operands(33, 70, 4, 4)
    found = triton_backend.solve_on_support(guarded(weight), keys, residuals, basis, 0.3)
    assert torch.equal(found, triton_backend.solve_on_support(weight, keys, residuals, basis, 0.3))


def test_a_transposed_weight():
    weight, keys, residuals, basis = operands(33, 70, 4, 4)
    found = triton_backend.solve_on_support(weight.T.contiguous().T, keys, residuals, basis, 0.3)
    assert torch.equal(found, triton_backend.solve_on_support(weight, keys, residuals, basis, 0.3))
    with pytest.raises(ValueError, match="but the second must be 1"):
        products_on_support(weight.T.contiguous().T, keys, basis)


def test_rows_in_several_launches(monkeypatch):
    given = operands(50, 40, 3, 3)
    whole = triton_backend.solve_on_support(*given, 0.3)
    monkeypatch.setattr(triton_backend, "BLOCK_ELEMENTS", 9 * 7)
    assert torch.equal(triton_backend.solve_on_support(*given, 0.3), whole)


def test_the_systems_are_solved_in_float64():
    # With a condition of 1e10 a float32 factor has no correct digit.
    rows, n = 20, MAX_SIZE
    products = torch.linalg.qr(torch.randn(rows, n, n))[0] * torch.logspace(0, -5, n)[:, None]
    residuals = torch.randn(rows, n)
    exact = torch_backend.solve_products(products, residuals, 1e-12)
    found, failed = solve_products(products.contiguous(), residuals, 1e-12)
    assert not failed.any()
    assert (found - exact).norm() <= 1e-4 * exact.norm()


def test_a_system_that_cannot_be_factored_is_an_error():
    weight, keys, residuals, basis = operands(4, 20, 3, 3)
    with pytest.raises(GuardError, match="singular to working precision"):
        triton_backend.solve_on_support(weight, keys * float("nan"), residuals, basis, 1.0)


def test_the_operator_is_one_of_torch():
    weight, keys, residuals, basis = operands(5, 20, 3, 2)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (weight, keys, residuals.T.contiguous(), basis, 0.5)
    torch.library.opcheck(triton_backend.solve_on_support_op, given, test_utils=checks)


@pytest.mark.parametrize("config", low_rank_update.CONFIGS)
def test_zeros_keep_their_bits(config):
    dtype = torch.float32 if config.endswith("float32") else torch.bfloat16
    weight = torch.randn(70, 136).to(dtype)
    weight[torch.rand(70, 136) < 0.3], weight[torch.rand(70, 136) < 0.3] = 0.0, -0.0
    left, right = torch.randn(70, 8), torch.randn(8, 136)
    kept, dense = weight.clone(), weight.clone()
    for target, keep_zeros in ((kept, True), (dense, False)):
        LowRankPlan([target], [left], [right], low_rank_update.CONFIGS[config], keep_zeros).run(1.0, False, 0)
    zeros, bits = weight == 0, INTEGERS[dtype]
    assert torch.equal(kept.view(bits)[zeros], weight.view(bits)[zeros])
    assert torch.equal(kept[~zeros], dense[~zeros])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zeros_keep_their_bits_in_the_backend(dtype, rounding):
    weight = torch.randn(40, 24).to(dtype) * (torch.rand(40, 24) < 0.5)
    left, right = torch.randn(24, 3), torch.randn(3, 40)
    kept, dense = weight.clone(), weight.clone()
    triton_backend.low_rank_update([kept.T], [left], [right], 1.0, rounding, 3, keep_zeros=True)
    triton_backend.low_rank_update([dense.T], [left], [right], 1.0, rounding, 3)
    zeros, bits = weight == 0, INTEGERS[dtype]
    assert torch.equal(kept.view(bits)[zeros], weight.view(bits)[zeros])
    assert torch.equal(kept[~zeros], dense[~zeros])


def test_the_bits_of_every_dtype_are_read_as_integers():
    assert {dtype.itemsize for dtype in DTYPES} == support_solve.BITS.keys() == support_solve.MAGNITUDES.keys()
