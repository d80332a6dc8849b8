import torch

from rocr.ops import reference


def random_metric(size):
    basis = torch.linalg.qr(torch.randn(size, size // 2, dtype=torch.float64)).Q
    return basis @ basis.T


def test_second_moment_is_the_sum_of_outer_products():
    keys = torch.randn(5, 3)
    expected = sum(torch.outer(key, key) for key in keys.double())
    torch.testing.assert_close(reference.second_moment(keys), expected)


def test_updated_weight_is_not_rounded():
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    tiny = torch.full((1, 1), 2.0**-20)
    assert reference.updated_weight(weight, tiny, tiny, scale=2.0).item() == 1.0 + 2.0**-39


def test_accumulating_rounds_once_and_leaves_the_upper_triangle():
    total = torch.full((3, 3), 2.0)
    keys = torch.randn(4, 3)
    reference.accumulate_second_moment(total, keys)
    exact = reference.second_moment(keys) + 2.0
    assert torch.equal(total.tril(), exact.float().tril())
    assert torch.equal(total.triu(1), torch.full((3, 3), 2.0).triu(1))


def test_dense_update_is_stationary_for_ridge_regression():
    # Without a metric the update minimises |K Δᵀ - R|² + λ |Δ|²: the gradient there is zero, elsewhere it is not.
    keys, residuals = torch.randn(6, 20).double(), torch.randn(6, 7).double()

    def gradient(update):
        update = update.clone().requires_grad_()
        loss = (keys @ update.T - residuals).square().sum() + 0.3 * update.square().sum()
        return torch.autograd.grad(loss, update)[0]

    assert gradient(torch.zeros(7, 20).double()).abs().max() > 1
    assert gradient(reference.dense_update(keys, residuals, None, 0.3)).abs().max() < 1e-12


def test_dense_update_annihilates_what_the_metric_protects():
    keys, residuals, metric = torch.randn(6, 20), torch.randn(6, 7), random_metric(20)
    protected = torch.eye(20) - metric
    free = reference.dense_update(keys, residuals, None, 1.0)
    assert (free @ protected).norm() > 0.1 * free.norm()
    held = reference.dense_update(keys, residuals, metric, 1.0)
    assert (held @ protected).norm() < 1e-12 * held.norm()
