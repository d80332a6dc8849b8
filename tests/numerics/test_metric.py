import pytest
import torch

from rocr import EditConfig, GuardError
from rocr.ops import reference
from rocr.solve.metric import _are_eigenpairs, build_metric
from rocr.solve.solve import solve_layer

SIZE = 63
RIDGE = 0.1


def second_moment(size=SIZE, rank=20, floor=0.0, scale=1.0):
    """Of keys that lie mostly in a few directions, float32."""
    directions = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.cat([torch.linspace(1.0, 9.0, rank).double(), torch.full((size - rank,), floor).double()])
    return (scale * (directions * values) @ directions.T).float(), directions[:, :rank]


def dense(metric, size=SIZE):
    return metric.apply(torch.eye(size, dtype=torch.float32)).double()


def projected(**changes):
    return EditConfig(method="projected", **changes)


@pytest.mark.parametrize("rank", [3, 20, 60])
def test_a_projector_is_idempotent_symmetric_and_of_the_free_rank(rank):
    moment, protected = second_moment(rank=rank)
    metric = build_metric(moment, projected())
    projector = dense(metric)
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-5)
    torch.testing.assert_close(projector, projector.T, rtol=0, atol=1e-5)
    assert metric.free_directions == torch.linalg.matrix_rank(projector, tol=0.5) == SIZE - rank
    assert (projector @ protected).abs().max() < 1e-5, "protected directions are annihilated"
    assert metric.protected == (rank < SIZE / 2), "the thinner basis is kept"
    assert min(metric.basis.shape) == min(rank, SIZE - rank)


@pytest.mark.parametrize("rank", [3, 20, 60])
def test_updates_leave_protected_directions_alone(rank):
    moment, protected = second_moment(rank=rank)
    keys, residuals = torch.randn(5, SIZE), torch.randn(5, 13)
    metric = build_metric(moment, projected())
    solution = solve_layer(keys, residuals, metric, RIDGE)
    update = solution.factors.left.double() @ solution.factors.right.double()
    without = solve_layer(keys, residuals, build_metric(moment, EditConfig(gamma=0.0)), RIDGE)
    moved = without.factors.left.double() @ without.factors.right.double() @ protected
    assert moved.norm() > 0.1, "without the metric they are moved"
    assert (update @ protected).norm() < 1e-5 * moved.norm()


def test_the_threshold_is_absolute_or_in_mean_eigenvalues():
    moment, _ = second_moment(rank=20, floor=0.01, scale=1.0)
    assert build_metric(moment, projected(threshold=0.02)).free_directions == SIZE - 20
    relative = projected(threshold=0.02, relative_threshold=True)
    for scale in (1e-3, 1.0, 1e3):
        assert build_metric(moment * scale, relative).free_directions == SIZE - 20
    assert build_metric(moment * 0.001, projected(threshold=0.02)).free_directions == SIZE


def test_the_threshold_divides_the_spectrum():
    values = torch.tensor([0.001, 0.019, 0.021, 0.5, 3.0])
    metric = build_metric(torch.diag(values), projected(threshold=0.02))
    torch.testing.assert_close(dense(metric, 5), torch.diag(torch.tensor([1.0, 1, 0, 0, 0])).double())
    assert metric.ordinary == pytest.approx(0.02)
    assert metric.describe() == "projected, 2 of 5 directions free"


@pytest.mark.parametrize("gamma", [0.0, 1.0, 100.0])
def test_whitening_is_its_formula(gamma):
    moment, _ = second_moment(floor=0.01)
    metric = build_metric(moment, EditConfig(gamma=gamma))
    exact = torch.linalg.inv(
        gamma * moment.double() / moment.double().diagonal().mean() + torch.eye(SIZE, dtype=torch.float64)
    )
    torch.testing.assert_close(dense(metric), exact, rtol=1e-4, atol=1e-5)
    assert metric.ordinary == pytest.approx(float((moment.double() * exact).sum()), rel=0.05)
    assert metric.describe() == f"whitened, γ = {gamma:g}"


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("method", ["whitened", "projected"])
def test_held_keys_weigh_as_the_setting_says(method, rows):
    moment, _ = second_moment(rank=10, floor=0.01)
    held = 3 * torch.randn(rows, SIZE)
    config = EditConfig(method=method, template_weight=0.2)
    both = moment.double() + 0.2 * held.double().T @ held.double() / rows
    found = dense(build_metric(moment, config, held))
    if method == "projected":
        torch.testing.assert_close(found, dense(build_metric(both.float(), config)), rtol=1e-4, atol=1e-5)
    else:
        exact = torch.linalg.inv(
            config.gamma * both / moment.double().diagonal().mean() + torch.eye(SIZE, dtype=torch.float64)
        )
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    without = dense(build_metric(moment, config))
    assert torch.equal(dense(build_metric(moment, EditConfig(method=method, template_weight=0.0), held)), without)
    assert torch.equal(dense(build_metric(moment, config, held[:0])), without)
    assert (held.double() @ found).norm() < 0.9 * (held.double() @ without).norm()


def test_held_keys_that_are_not_finite_are_refused():
    moment, _ = second_moment(floor=0.01)
    with pytest.raises(GuardError, match="templates' own tokens are not finite"):
        build_metric(moment, EditConfig(template_weight=0.1), torch.full((1, SIZE), torch.inf))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_whitening_has_no_scale(scale):
    moment, _ = second_moment(floor=0.01)
    expected = dense(build_metric(moment, EditConfig()))
    torch.testing.assert_close(dense(build_metric(moment * scale, EditConfig())), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [EditConfig(), projected()], ids=["whitened", "projected"])
def test_the_factored_metric_gives_the_dense_solution(config):
    moment, _ = second_moment()
    keys, residuals = torch.randn(7, SIZE), torch.randn(7, 13)
    metric = build_metric(moment.double(), config)
    solution = solve_layer(keys.double(), residuals.double(), metric, RIDGE)
    expected = reference.dense_update(keys, residuals, dense(metric), RIDGE)
    torch.testing.assert_close(solution.factors.left @ solution.factors.right, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("config", [EditConfig(), projected()], ids=["whitened", "projected"])
def test_same_moment_same_bytes(config):
    moment, _ = second_moment()
    torch.manual_seed(1)
    first = build_metric(moment, config)
    torch.manual_seed(2)
    second = build_metric(moment, config)
    assert first.ordinary == second.ordinary
    assert torch.equal(dense(first), dense(second))


def test_a_weight_of_ordinary_keys_beyond_float32():
    keys = torch.randn(40, SIZE, dtype=torch.float64)
    moment = keys.T @ keys / 40
    floor = float(torch.linalg.eigvalsh(moment.float().double())[0])
    assert floor < 0, "rounded to float32, the moment is not semidefinite any more"
    scale = float(moment.diagonal().mean())
    in_float64_only = build_metric(moment.float(), EditConfig(gamma=0.5 * scale / -floor))
    assert in_float64_only.apply(torch.randn(3, SIZE)).isfinite().all()
    with pytest.raises(GuardError, match="not positive definite to its own precision: lower gamma"):
        build_metric(moment.float(), EditConfig(gamma=10 * scale / -floor))


def raising(_values, _vectors):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


FAULTS = {
    "raises": raising,
    "no vectors": lambda values, vectors: (values, vectors * 0),
    "not finite": lambda values, vectors: (values, vectors * torch.nan),
    "values of others": lambda values, vectors: (values.roll(1), vectors),
    "not orthogonal": lambda values, vectors: (values, vectors + 0.01 * vectors.roll(1, dims=1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_eigenvectors_that_are_none_are_found_again_in_float64(fault, monkeypatch):
    moment, protected = second_moment(rank=20)
    eigh = torch.linalg.eigh

    def faulty_in_float32(matrix):
        found = eigh(matrix)
        return FAULTS[fault](*found) if matrix.dtype == torch.float32 else found

    monkeypatch.setattr(torch.linalg, "eigh", faulty_in_float32)
    metric = build_metric(moment, projected())
    assert metric.basis.dtype == torch.float32
    assert metric.free_directions == SIZE - 20
    assert (dense(metric) @ protected).abs().max() < 1e-5
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: FAULTS[fault](*eigh(matrix)))
    with pytest.raises(GuardError, match=r"\(63 x 63\) could not be computed, in float64 either: use the method"):
        build_metric(moment, projected())


def test_eigenvectors_are_not_doubted_over_a_wide_range():
    keys = torch.randn(300, SIZE, dtype=torch.float64) * torch.logspace(-4, 4, SIZE, dtype=torch.float64)
    moment = (keys.T @ keys / 300).float()
    values, vectors = torch.linalg.eigh(moment)
    assert _are_eigenpairs(moment, values, vectors)


@pytest.mark.parametrize("config", [EditConfig(), projected()], ids=["whitened", "projected"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_moments_that_are_not_finite_or_zero_are_refused(config, value):
    moment = torch.zeros(5, 5)
    moment[2, 3] = moment[3, 2] = value
    if value == 0.0:
        with pytest.raises(GuardError, match="not finite or zero"):
            build_metric(moment, config)
        return
    with pytest.raises(GuardError, match="not finite"):
        build_metric(moment + torch.eye(5), config)


def test_no_free_direction_is_refused():
    with pytest.raises(
        GuardError, match=r"No direction is free: all 4 eigenvalues .* at least 0\.02 .* smallest is 0\.5"
    ):
        build_metric(torch.eye(4) * 0.5, projected())


def test_no_protected_direction_is_told():
    metric = build_metric(torch.eye(4) * 0.01, projected())
    assert metric.describe() == "projected, all 4 directions free: ordinary keys are not protected"
    moment, _ = second_moment()
    assert "not protected" not in build_metric(moment, projected()).describe()
