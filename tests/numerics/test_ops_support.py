"""Solves on the support of a sparse weight, and updates that keep its zeros, in every backend."""

import pytest
import torch

from rocr import ops
from rocr.errors import GuardError, InputError
from rocr.ops import cpp_backend, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool)
SHAPES = ((1, 1, 1, 1), (70, 300, 8, 8), (33, 1000, 5, 7), (20, 400, 20, 17), (150, 100, 9, 50))
"""Rows and columns of the weight, keys, rows of the basis."""

ERROR_OVER_TORCH = 1.3
"""Bound of a backend's error over that of float32 products in torch; measured at most 1.13."""

BACKENDS = [name for name in ops.available_backends("cpu") if name != "reference"]
PATHS = [name for name in BACKENDS if name != "cpp"]
PATHS += [f"cpp {simd}" for simd in (cpp_backend.simd_names() if "cpp" in BACKENDS else [])]


@pytest.fixture(params=PATHS)
def backend(request, monkeypatch):
    """Each backend, the compiled one with every instruction set."""
    name, _, simd = request.param.partition(" ")
    if simd:
        monkeypatch.setenv(cpp_backend.SIMD_VARIABLE, simd)
    return name


def operands(rows, columns, n, m, dtype=torch.bfloat16):
    weight = (torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)).to(dtype)
    return weight, torch.randn(n, columns), torch.randn(n, rows), torch.randn(m, columns) / columns**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_row_is_the_least_squares_in_float64(guarded, backend, dtype, shape):
    weight, keys, residuals, basis = operands(*shape, dtype)
    exact = ops.solve_on_support(weight, keys, residuals, basis, 0.3, "reference")
    by_torch = ops.solve_on_support(weight, keys, residuals, basis, 0.3, "torch")
    held = weight if dtype == torch.bool else guarded(weight)
    found = ops.solve_on_support(held, guarded(keys), guarded(residuals), guarded(basis), 0.3, backend)
    rounding = torch.finfo(torch.float32).eps * exact.norm()
    assert (found - exact).norm() <= ERROR_OVER_TORCH * (by_torch - exact).norm() + rounding
    assert (found - exact).norm() <= 2e-5 * exact.norm()


def test_the_formula_of_one_row():
    # One row with the support {0, 2}: A = 1·5 + 3·7 = 26, z = A r / (A² + λ).
    weight = torch.tensor([[2.0, 0.0, -1.0, -0.0]])
    keys, basis = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    found = ops.solve_on_support(weight, keys, torch.tensor([[10.0]]), basis, 4.0, "reference")
    assert found.item() == pytest.approx(26 * 10 / (26**2 + 4))


def test_a_row_without_support_has_no_update(backend):
    weight, keys, residuals, basis = operands(20, 64, 4, 4)
    weight[3] = 0.0
    found = ops.solve_on_support(weight, keys, residuals, basis, 0.1, backend)
    assert not found[3].any()
    assert found[4].any()


def test_views_and_other_dtypes(backend):
    weight, keys, residuals, basis = operands(40, 70, 5, 5)
    exact = ops.solve_on_support(weight, keys, residuals, basis, 0.5, "reference")
    found = ops.solve_on_support(
        weight.T.contiguous().T, keys.double(), residuals.T.contiguous().T, basis.double(), 0.5, backend
    )
    assert (found - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension was not compiled")
def test_the_number_of_threads_does_not_change_a_byte(with_threads):
    weight, keys, residuals, basis = operands(700, 1100, 6, 6)
    one, three = (
        with_threads(count, lambda: ops.solve_on_support(weight, keys, residuals, basis, 0.5, "cpp"))
        for count in (1, 3)
    )
    assert torch.equal(one, three)


@pytest.mark.parametrize("empty", ["rows", "columns", "keys", "basis"])
def test_empty_operands(backend, empty):
    rows, columns, n, m = (0 if empty == name else 3 for name in ("rows", "columns", "keys", "basis"))
    weight, keys, residuals = torch.ones(rows, columns), torch.ones(n, columns), torch.ones(n, rows)
    found = ops.solve_on_support(weight, keys, residuals, torch.ones(m, columns), 1.0, backend)
    assert found.shape == (rows, m)
    assert not found.any()


def test_a_system_that_cannot_be_factored_is_an_error(backend):
    weight, keys, residuals, basis = operands(4, 20, 3, 3)
    with pytest.raises(GuardError, match=r"not finite|singular"):
        ops.solve_on_support(weight, keys * 1e38, residuals, basis * 1e38, 1.0, backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": 0.0}, "ridge is 0, but must be above 0"),
        ({"ridge": float("inf")}, "ridge is inf"),
        ({"weight": torch.ones(3, 4, 5)}, "must be matrices"),
        ({"weight": torch.ones(7, 5)}, r"\(7, 5\), \(2, 4\), \(2, 3\) and \(2, 4\)"),
        ({"basis": torch.ones(2, 5)}, r"\(3, 4\), \(2, 4\), \(2, 3\) and \(2, 5\)"),
        ({"weight": torch.ones(3, 4, dtype=torch.int8)}, "weight must be float32"),
        ({"basis": torch.ones(2, 4, dtype=torch.int64)}, "basis must be of a floating-point dtype"),
        ({"basis": torch.ones(2, 4, device="meta")}, "basis on meta"),
        ({"backend": "cuda"}, "cuda"),
    ],
    ids=str,
)
def test_wrong_operands(change, message):
    given = {
        "weight": torch.ones(3, 4),
        "keys": torch.ones(2, 4),
        "residuals": torch.ones(2, 3),
        "basis": torch.ones(2, 4),
        "ridge": 1.0,
    }
    with pytest.raises(InputError, match=message):
        ops.solve_on_support(**given | change)


def test_what_is_not_finite_is_an_error():
    weight, keys, residuals, basis = operands(4, 20, 3, 3)
    keys[1, 2] = float("nan")
    with pytest.raises(GuardError, match="1 of 60 elements of keys"):
        ops.solve_on_support(weight, keys, residuals, basis, 1.0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rows, columns, rank", [(5, 7, 1), (97, 300, 16), (64, 100, 300)])
def test_zeros_keep_their_bits(backend, dtype, rounding, rows, columns, rank):
    start = torch.randn(rows, columns).to(dtype)
    start[torch.rand(rows, columns) < 0.4] = 0.0
    start[torch.rand(rows, columns) < 0.2] = -0.0
    left, right = torch.randn(rows, rank), torch.randn(rank, columns)
    dense, kept = start.clone(), start.clone()
    ops.low_rank_update(dense, left, right, rounding=rounding, seed=3, backend=backend)
    ops.low_rank_update(kept, left, right, rounding=rounding, seed=3, backend=backend, keep_zeros=True)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    zeros = start == 0
    assert torch.equal(kept.view(bits)[zeros], start.view(bits)[zeros]), "the sign of a zero too"
    assert torch.equal(kept[~zeros], dense[~zeros]), "the others are those of the plain update"
    assert not torch.equal(dense[zeros], start[zeros])


def test_zeros_of_a_transposed_weight_keep_their_bits(backend):
    start = (torch.randn(60, 40) * (torch.rand(60, 40) < 0.5)).bfloat16()
    left, right = torch.randn(40, 4), torch.randn(4, 60)
    weight = start.clone()
    ops.low_rank_update(weight.T, left, right, keep_zeros=True, backend=backend)
    exact = reference.updated_weight(start.T, left, right)
    assert torch.equal(weight == 0, start == 0)
    assert (weight.T.double() - exact)[start.T != 0].abs().max() <= 2.0**-8 * exact.abs().max()


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_a_backend_without_updates_is_refused_and_never_chosen(monkeypatch, keep_zeros):
    monkeypatch.setattr("rocr.ops.cuda_backend.is_available", lambda _: True)
    assert "cuda" in ops.available_backends("cpu")
    weight, left, right = torch.ones(2, 2), torch.ones(2, 1), torch.ones(1, 2)
    message = r"The backend 'cuda' has no low-rank update; choose one of (cpp, )?torch, reference\."
    with pytest.raises(InputError, match=message):
        ops.low_rank_update(weight, left, right, backend="cuda", keep_zeros=keep_zeros)
    ops.low_rank_update(weight, left, right, keep_zeros=keep_zeros)
    assert weight.eq(2).all()
