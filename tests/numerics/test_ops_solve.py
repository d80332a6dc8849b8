import pytest
import torch

from rocr import ops
from rocr.errors import GuardError, InputError
from rocr.ops import reference
from rocr.ops import system as small_system


def projector(size, rank):
    basis = torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q
    return basis @ basis.T


def problem(keys_count=9, d_in=40, d_out=13, dtype=torch.float64):
    return torch.randn(keys_count, d_in, dtype=dtype), torch.randn(keys_count, d_out, dtype=dtype)


class Thin:
    """The projector I - U Uᵀ, stored as its complement."""

    def __init__(self, complement):
        self.complement = complement

    def apply(self, keys):
        complement = self.complement.to(keys.dtype)
        return keys - (keys @ complement) @ complement.T


@pytest.mark.parametrize("keys_count", [1, 9, 40, 63])
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", ["identity", "projector", "whitened"])
def test_equals_the_dense_official_solve(keys_count, ridge, name):
    keys, residuals = problem(keys_count)
    moment = torch.randn(100, 40, dtype=torch.float64)
    metrics = {"identity": None, "projector": projector(40, 30), "whitened": torch.linalg.inv(moment.T @ moment / 100)}
    left, right = ops.solve_update(keys, residuals, metrics[name], ridge)
    assert left.shape == (13, keys_count) and right.shape == (keys_count, 40)
    dense = reference.dense_update(keys, residuals, metrics[name], ridge)
    assert (left @ right - dense).norm() <= 1e-9 * dense.norm()


def test_equals_the_dense_official_solve_in_the_shape_of_a_real_layer():
    keys, residuals = problem(100, 1536, 576, torch.float32)
    complement = torch.linalg.qr(torch.randn(1536, 300, dtype=torch.float64)).Q
    left, right = ops.solve_update(keys, residuals, Thin(complement), 1.0)
    assert left.dtype == right.dtype == torch.float32
    dense = reference.dense_update(keys, residuals, torch.eye(1536).double() - complement @ complement.T, 1.0)
    assert (left.double() @ right.double() - dense).norm() <= 1e-5 * dense.norm()


def test_the_key_reaches_its_target_when_the_ridge_goes_to_zero():
    keys, residuals = problem()
    metric = projector(40, 30)
    gram, misses = keys @ metric @ keys.T, []
    for ridge in (1.0, 1e-3, 1e-6, 0.0):
        left, right = ops.solve_update(keys, residuals, metric, ridge)
        missed = residuals - keys @ (left @ right).T
        # What is left of the residuals is λ (K M Kᵀ + λI)⁻¹ of them, along each eigenvector of K M Kᵀ.
        values, vectors = torch.linalg.eigh(gram)
        expected = vectors @ ((ridge / (values + ridge))[:, None] * (vectors.T @ residuals))
        torch.testing.assert_close(missed, expected, rtol=1e-8, atol=1e-12)
        misses.append(missed.norm().item() / residuals.norm().item())
    assert misses == sorted(misses, reverse=True)
    assert misses[0] > 1e-3 and misses[-1] < 1e-12


def test_protected_directions_are_annihilated_and_the_rank_is_at_most_n():
    keys, residuals = problem()
    metric = projector(40, 30)
    protected = torch.eye(40).double() - metric
    left, right = ops.solve_update(keys, residuals, metric, 0.5)
    assert (left @ right @ protected).norm() < 1e-12 * (left @ right).norm()
    assert torch.linalg.matrix_rank(left @ right) == 9
    left, right = ops.solve_update(keys, residuals, None, 0.5)
    assert (left @ right @ protected).norm() > 0.1 * (left @ right).norm()


def test_an_object_that_applies_the_metric_is_as_good_as_the_matrix():
    keys, residuals = problem()
    complement = torch.linalg.qr(torch.randn(40, 10, dtype=torch.float64)).Q
    dense = ops.solve_update(keys, residuals, torch.eye(40).double() - complement @ complement.T, 0.1)
    thin = ops.solve_update(keys, residuals, Thin(complement), 0.1)
    for one, other in zip(dense, thin, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_factors_have_the_dtype_of_the_keys_and_float32_at_least(dtype):
    keys, residuals = problem(dtype=torch.float32)
    left, right = ops.solve_update(keys.to(dtype), residuals, None, 1.0)
    assert left.dtype == right.dtype == torch.promote_types(dtype, torch.float32)
    assert left.is_contiguous() and right.is_contiguous()


@pytest.mark.parametrize("keys_count", [1, 9])
def test_factors_have_memory_of_their_own(keys_count):
    keys, residuals = problem(keys_count)
    before = keys.clone(), residuals.clone()
    for factor in ops.solve_update(keys, residuals, None, 1.0):
        factor.fill_(7.0)
    assert torch.equal(keys, before[0]) and torch.equal(residuals, before[1])


def test_no_keys_give_an_update_of_rank_zero():
    left, right = ops.solve_update(*problem(0), None, 1.0)
    assert left.shape == (13, 0) and right.shape == (0, 40)


@pytest.mark.parametrize("ridge", [-1e-9, float("nan"), float("inf")])
def test_a_ridge_that_is_none(ridge):
    with pytest.raises(InputError, match=f"ridge is {ridge}"):
        ops.solve_update(*problem(), None, ridge)


def test_singular_systems_are_refused():
    keys, residuals = problem()
    twice = torch.cat([keys, keys]), torch.cat([residuals, residuals])
    with pytest.raises(GuardError, match=r"system of 18 keys is singular.*ridge 0"):
        ops.solve_update(*twice, None, 0.0)
    ops.solve_update(*twice, None, 1e-6)
    with pytest.raises(GuardError, match="singular"):
        ops.solve_update(keys, residuals, torch.zeros(40, 40).double(), 0.0)
    with pytest.raises(GuardError, match="singular"):
        ops.solve_update(keys, residuals, -torch.eye(40).double(), 1.0)


@pytest.mark.parametrize("name", ["keys", "residuals", "metric"])
def test_numbers_that_are_not_finite_are_refused(name):
    tensors = dict(zip(("keys", "residuals"), problem(), strict=True), metric=torch.eye(40).double())
    tensors[name][3, 2] = float("inf")
    with pytest.raises(GuardError, match="not finite"):
        ops.solve_update(**tensors, ridge=1.0)


def test_keys_too_large_for_float64_are_refused():
    keys, residuals = problem()
    with pytest.raises(GuardError, match="Gram matrix of the keys are not finite"):
        ops.solve_update(keys * 1e200, residuals, None, 1.0)


def test_shapes_that_do_not_fit():
    keys, residuals = problem()
    with pytest.raises(InputError, match=r"\(9, 40\) and \(8, 13\)"):
        ops.solve_update(keys, residuals[:8], None, 1.0)
    with pytest.raises(InputError, match=r"metric must be \(40, 40\).*is \(39, 40\)"):
        ops.solve_update(keys, residuals, torch.zeros(39, 40).double(), 1.0)
    with pytest.raises(InputError, match="metric must be symmetric"):
        ops.solve_update(keys, residuals, torch.randn(40, 40).double(), 1.0)
    with pytest.raises(InputError, match=r"floating-point dtype, but are torch\.int64"):
        ops.solve_update(keys.long(), residuals, None, 1.0)


@pytest.mark.parametrize("count", [1, 64, 200])
def test_the_way_of_a_gpu_is_as_exact(count):
    keys = torch.randn(count, 250, dtype=torch.float64)
    factor = torch.linalg.cholesky(keys @ keys.T + torch.eye(count))
    expected = torch.cholesky_solve(keys, factor)
    torch.testing.assert_close(small_system.solve_by_inverse(factor, keys), expected, rtol=1e-9, atol=1e-12)
