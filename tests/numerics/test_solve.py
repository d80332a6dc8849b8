import pytest
import torch

import rocr
from rocr import Concept, GuardError
from rocr.ops import reference
from rocr.solve.metric import build_metric
from rocr.solve.solve import check_finite, solve_layer

D_IN, D_OUT = 63, 13


def problem(n, scale=1.0):
    keys, residuals = torch.randn(n, D_IN) * scale, torch.randn(n, D_OUT)
    samples = torch.randn(500, D_IN) * torch.linspace(0.1, 2.0, D_IN)
    return keys, residuals, build_metric(samples.T @ samples / 500, rocr.EditConfig())


@pytest.mark.parametrize("n", [1, 5, 40])
def test_keys_reach_their_residuals_as_the_ridge_goes_to_zero(n):
    keys, residuals, metric = problem(n)
    errors = []
    for ridge in (10.0, 0.1, 1e-3, 1e-6):
        solution = solve_layer(keys, residuals, metric, ridge)
        moved = keys.double() @ (solution.factors.left.double() @ solution.factors.right.double()).T
        errors.append(float((moved - residuals).norm() / residuals.norm()))
    assert errors[0] > 0.1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("n", [1, 5, 40])
def test_an_update_has_at_most_the_rank_of_its_keys(n):
    solution = solve_layer(*problem(n), 0.1)
    update = solution.factors.left.double() @ solution.factors.right.double()
    assert update.shape == (D_OUT, D_IN)
    assert torch.linalg.matrix_rank(update, rtol=1e-6) == min(n, D_OUT)
    assert solution.factors.left.dtype == solution.factors.right.dtype == torch.float32


def test_it_is_the_dense_solution():
    keys, residuals, metric = problem(9)
    expected = reference.dense_update(keys, residuals, metric.apply(torch.eye(D_IN)), 0.1)
    solution = solve_layer(keys, residuals, metric, 0.1)
    torch.testing.assert_close(
        solution.factors.left.double() @ solution.factors.right.double(), expected, rtol=1e-4, atol=1e-6
    )


def test_the_condition_is_that_of_the_system():
    keys, residuals, metric = problem(9)
    gram = keys.double() @ metric.apply(keys).double().T
    for ridge in (1e-3, 1.0, 1e6):
        expected = torch.linalg.cond(gram + ridge * torch.eye(9, dtype=torch.float64))
        solution = solve_layer(keys, residuals, metric, ridge)
        assert solution.condition == pytest.approx(float(expected), rel=1e-3)
        assert solution.ridge == ridge


def test_the_factors_share_no_memory_with_what_they_were_solved_from():
    keys, residuals, metric = problem(1)
    solution = solve_layer(keys, residuals, metric, 0.1)
    before = solution.factors.left.clone(), solution.factors.right.clone()
    keys.zero_()
    residuals.zero_()
    assert torch.equal(solution.factors.left, before[0]) and torch.equal(solution.factors.right, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(value):
    keys, residuals, metric = problem(5)
    keys[2, 7] = value
    with pytest.raises(GuardError, match="not finite"):
        solve_layer(keys, residuals, metric, 0.1)


def test_keys_that_repeat_are_solved_by_the_ridge():
    keys, residuals, metric = problem(5)
    once = solve_layer(keys, residuals, metric, 0.1)
    twice = solve_layer(keys.repeat(2, 1), residuals.repeat(2, 1), metric, 0.2)
    torch.testing.assert_close(
        twice.factors.left @ twice.factors.right, once.factors.left @ once.factors.right, rtol=1e-4, atol=1e-5
    )


def test_values_that_are_not_finite_are_named_by_their_concepts():
    concepts = [Concept(f"name {i}", "other") for i in range(9)]
    values = torch.randn(18, 4)
    concept_of = [i // 2 for i in range(18)]
    check_finite("keys", 3, values, concept_of, concepts)
    values[5, 1] = float("nan")
    with pytest.raises(GuardError, match=r"The keys at layer 3 are not finite for name 2: the model overflows there"):
        check_finite("keys", 3, values, concept_of, concepts)
    values[:] = float("-inf")
    with pytest.raises(GuardError, match=r"name 0, name 1, name 2, name 3, name 4 and 4 more"):
        check_finite("keys", 3, values, concept_of, concepts)


def test_no_smaller_update_serves_the_keys_as_well():
    """With λ → 0 it is the update of least tr(Δ M⁻¹ Δᵀ), how much it changes ordinary keys, that hits the residuals."""
    keys, residuals, metric = problem(9)
    solution = solve_layer(keys, residuals, metric, 1e-6)
    update = solution.factors.left.double() @ solution.factors.right.double()
    inverse = torch.linalg.inv(metric.apply(torch.eye(D_IN)).double())
    cost = (update @ inverse @ update.T).trace()
    free = torch.eye(D_IN, dtype=torch.float64) - torch.linalg.pinv(keys.double()) @ keys.double()
    for size in (0.01, 0.1, 1.0):
        for _ in range(5):
            other = update + size * update.norm() / D_IN * torch.randn(D_OUT, D_IN, dtype=torch.float64) @ free
            torch.testing.assert_close(keys.double() @ other.T, keys.double() @ update.T, rtol=1e-6, atol=1e-8)
            assert (other @ inverse @ other.T).trace() > cost


@pytest.mark.parametrize("n", [D_IN - 1, D_IN, D_IN + 1, 200])
@pytest.mark.parametrize("d_out", [13, D_IN + 7])
def test_it_is_the_dense_solution_on_both_sides_of_as_many_keys_as_inputs(n, d_out):
    keys, _, metric = problem(n)
    residuals = torch.randn(n, d_out)
    expected = reference.dense_update(keys, residuals, metric.apply(torch.eye(D_IN)), 0.5)
    solution = solve_layer(keys, residuals, metric, 0.5)
    found = solution.factors.left.double() @ solution.factors.right.double()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    # Its move at other keys, from the coefficients of the keys.
    at = torch.randn(5, D_IN)
    coefficients = solution.coefficients(keys, at)(torch.arange(n)).double()
    torch.testing.assert_close(residuals.double().T @ coefficients, expected @ at.double().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d_out", [13, 70])
def test_more_keys_than_inputs_store_no_identity(d_out):
    keys, _, metric = problem(200)
    factors = solve_layer(keys, torch.randn(200, d_out), metric, 0.5).factors
    stored = [values for values in (factors.stored_left, factors.stored_right) if values is not None]
    assert [values.shape for values in stored] == [(d_out, D_IN)] and factors.matrix is stored[0]
    assert factors.shape == (d_out, D_IN) and factors.rank == min(d_out, D_IN)
    whole = factors.left @ factors.right
    assert torch.equal(whole, stored[0])
    torch.testing.assert_close(factors.moves(keys), keys @ whole.T)
    assert factors.norm() == pytest.approx(float(whole.double().norm()), rel=1e-12)


class Unprotected:
    """The identity as a metric."""

    ordinary = 1.0

    def apply(self, keys):
        return keys

    root = root_transposed = apply


@pytest.mark.parametrize("n", [8, 64])
def test_a_singular_system_is_refused_whatever_the_number_of_keys(n):
    keys = torch.randn(4, 32).repeat(n // 4, 1)
    with pytest.raises(GuardError, match=rf"The system of {n} keys is singular .*raise the ridge"):
        solve_layer(keys, torch.randn(n, 16), Unprotected(), 1e-20)
    assert solve_layer(keys, torch.randn(n, 16), Unprotected(), 1e-3).condition > 1e3


@pytest.mark.parametrize("size", [512, 513])
def test_the_condition_is_right_on_both_sides_of_its_exact_size(size):
    scales = torch.logspace(0, 1, size)
    keys = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q * scales.double()
    solution = solve_layer(keys.float(), torch.randn(size, 3), Unprotected(), 0.5)
    assert solution.condition == pytest.approx(100.5 / 1.5, rel=0.02)


def test_the_gram_matrix_is_formed_and_factored_once(monkeypatch):
    keys, residuals, metric = problem(600)
    factored, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: factored.append(len(matrix)) or cholesky(matrix))
    solve_layer(keys, residuals, metric, 0.5)
    solve_layer(keys[:9], residuals[:9], metric, 0.5)
    assert factored == [D_IN, 9]
