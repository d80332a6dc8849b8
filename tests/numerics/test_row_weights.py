"""Rows that close a share of their residual at least, against float64 and single systems."""

from dataclasses import replace

import pytest
import torch

import rocr
from rocr import Concept, EditConfig
from rocr.solve.metric import build_metric
from rocr.solve.mixture import WeighedKeys
from rocr.solve.row_weights import MAX_WEIGHT, weigh_rows
from rocr.solve.solve import solve_layer

D_IN, D_OUT = 24, 16


@pytest.fixture
def problem():
    """Keys of very different length under the metric, residuals, the metric and the second moment."""
    torch.manual_seed(0)
    ordinary = torch.randn(400, D_IN) * torch.logspace(-1, 1, D_IN)
    moment = ordinary.T @ ordinary / len(ordinary)
    keys = torch.diag(torch.logspace(-0.5, 0.5, D_IN)) + 0.01 * torch.randn(D_IN, D_IN)
    return keys[::3].contiguous(), torch.randn(8, D_OUT), build_metric(moment, EditConfig()), moment


def closed(keys, residuals, metric, ridge):
    """The share of each residual that each key closes alone."""
    shares = []
    for key, residual in zip(keys, residuals, strict=True):
        factors = solve_layer(key[None], residual[None], metric, ridge).factors
        shares.append(float(factors.moves(key[None]) @ residual / (residual @ residual)))
    return torch.tensor(shares)


@pytest.mark.parametrize("share", [0.4, 0.7, 0.9])
def test_a_key_alone_closes_the_share_or_what_the_ridge_closes_already(problem, share):
    keys, residuals, metric, _ = problem
    before = closed(keys, residuals, metric, 0.2)
    weighed, targets, _ = weigh_rows(keys, residuals, metric, 0.2, torch.full((8,), share))
    after = closed(weighed, targets, metric, 0.2)
    weights = (weighed / keys)[:, 0].square()
    reached = weights < MAX_WEIGHT * (1 - 1e-5)
    assert reached.any() and (before < share).any()
    assert torch.allclose(after[reached], before.clamp(min=share)[reached], atol=1e-5)
    capped = MAX_WEIGHT * before / (MAX_WEIGHT * before + 1 - before)
    assert torch.allclose(after[~reached], capped[~reached], atol=1e-5)
    assert torch.equal(weights == 1, before >= share)


def test_weighed_rows_minimise_the_weighed_objective(problem):
    """Σ wᵢ|kᵢΔᵀ − rᵢ|² + λ tr(Δ M⁻¹ Δᵀ), whose gradient is solved for in float64."""
    keys, residuals, metric, moment = problem
    weighed, targets, _ = weigh_rows(keys, residuals, metric, 0.3, torch.full((8,), 0.9))
    weights = (weighed / keys)[:, :1].double().square()
    inverse = 10.0 * moment.double() / moment.double().diagonal().mean() + torch.eye(D_IN, dtype=torch.float64)
    gram = (keys.double() * weights).T @ keys.double() + 0.3 * inverse
    expected = torch.linalg.solve(gram, (keys.double() * weights).T @ residuals.double()).T
    factors = solve_layer(weighed, targets, metric, 0.3).factors
    found = factors.left.double() @ factors.right.double()
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_weight_depends_on_its_own_row_only_and_rows_of_0_stay(problem):
    keys, residuals, metric, _ = problem
    shares = torch.full((8,), 0.9)
    shares[::2] = 0.0
    weighed, targets, _ = weigh_rows(keys, residuals, metric, 0.3, shares)
    assert torch.equal(weighed[::2], keys[::2]) and torch.equal(targets[::2], residuals[::2])
    assert not torch.equal(weighed[1::2], keys[1::2])
    for row in range(1, 8, 2):
        alone = weigh_rows(keys[row : row + 1], residuals[row : row + 1], metric, 0.3, shares[row : row + 1])
        assert torch.allclose(alone[0], weighed[row], rtol=1e-5) and torch.allclose(alone[1], targets[row], rtol=1e-5)
    assert weigh_rows(keys, residuals, metric, 0.3, torch.zeros(8)) == (keys, residuals, metric)


def test_the_product_of_a_mixture_is_weighed_like_its_keys(problem):
    keys, residuals, metric, _ = problem
    retained = torch.randn(2, D_IN)
    product = metric.apply(torch.cat([keys, retained])).float()
    mixture = WeighedKeys(product, metric.ordinary, 1, 1, "whitened")
    dense = weigh_rows(keys, residuals, metric, 0.3, torch.full((8,), 0.9))
    wide = weigh_rows(keys, residuals, mixture, 0.3, torch.full((8,), 0.9))
    assert torch.allclose(dense[0], wide[0], rtol=1e-5) and torch.allclose(dense[1], wide[1], rtol=1e-5)
    assert torch.allclose(wide[2].product[:8], metric.apply(wide[0]).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(wide[2].product[8:], product[8:]) and torch.equal(mixture.product, product)


def test_only_the_last_tokens_of_own_names_are_weighed(model, tokenizer, statistics):
    concepts = [Concept("Ada Byron", "a gardener", aliases=("Countess Lovelace",)), Concept("Blaise Pascal", "rain")]
    config = EditConfig(layers=(1,), templates=("Who is {}?",), ridge=10.0, retain_weight=0.0)
    rows = []
    for share in (0.0, 0.9):
        edit = rocr.unlearn(model, tokenizer, concepts, statistics, replace(config, least_closed=share), retain=[])
        rows.append(edit.updates[0].keys)
        edit.revert(model)
    plan = rocr.keys.plan.plan_keys(tokenizer, concepts, config)
    weighed = torch.tensor(plan.is_last)
    assert weighed.sum() == 3 and not weighed.all()
    assert torch.equal((rows[0] == rows[1]).all(dim=1), ~weighed)
