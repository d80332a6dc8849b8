import pytest
import torch

from rocr import ops
from rocr.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [name for name in ops.available_backends("cpu") if name != "reference"]
SHAPES = ((1, 1, 1), (63, 123, 1), (123, 63, 4), (97, 300, 16), (130, 200, 63), (40, 100, 700), (7, 4500, 3))

ERROR_OVER_TORCH = 1.25
"""Bound of a backend's error over that of W.copy_(W.float().addmm_(left, right)); measured at most 1.19 (float32)."""


def random_update(rows, columns, rank, dtype):
    weight = torch.randn(rows, columns).to(dtype)
    return weight, torch.randn(rows, rank), torch.randn(rank, columns) / rank


def error(weight, exact):
    return (weight.double() - exact).norm().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, rank", SHAPES)
def test_error_is_that_of_torch(guarded, backend, dtype, rows, columns, rank):
    start, left, right = random_update(rows, columns, rank, dtype)
    exact = reference.updated_weight(start, left, right, scale=0.7)
    by_torch = start.float().addmm(left, right, alpha=0.7).to(dtype)
    weight = guarded(start)
    ops.low_rank_update(weight, guarded(left), guarded(right), scale=0.7, backend=backend)
    rounding = torch.finfo(torch.float32).eps * exact.norm().item()
    assert error(weight, exact) <= ERROR_OVER_TORCH * error(by_torch, exact) + rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_is_rounded_once_to_nearest_even(backend, dtype):
    # With an identity as left factor the exact result is the right factor: every float32 meets torch's conversion.
    bits = torch.randint(-(2**31), 2**31 - 1, (256, 256), dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = torch.where(values.isfinite(), values, torch.zeros(()))
    values[::2] = torch.randn(128, 256) * torch.exp2(torch.randint(-28, 17, (128, 256)).float())
    weight = torch.zeros(256, 256, dtype=dtype)
    ops.low_rank_update(weight, torch.eye(256), values, backend=backend)
    assert torch.equal(weight, values.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_zero_update_changes_no_bit(backend, rounding, dtype):
    weight = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    weight = torch.where(weight.isnan(), torch.ones((), dtype=dtype), weight)
    before = weight.clone()
    ops.low_rank_update(weight, torch.zeros(256, 2), torch.zeros(2, 256), rounding=rounding, backend=backend)
    # -0 + 0 is +0, so signs of zeros aside.
    assert torch.equal(weight, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_is_not_finite_stays_so(backend, rounding, dtype):
    weight = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]], dtype=dtype).repeat(3, 20)
    before = weight.clone()
    ops.low_rank_update(weight, torch.zeros(3, 1), torch.zeros(1, 80), rounding=rounding, backend=backend)
    assert torch.equal(weight.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("place", [0, 13, 31, 32, 49])
def test_a_nan_of_the_update_is_not_rounded(backend, dtype, place):
    right = torch.ones(1, 50)
    # A carry from the last bits of this NaN would make it -0.
    right.view(torch.int32)[0, place] = 0x7FFFFFFF
    weight = torch.zeros(3, 50, dtype=dtype)
    ops.low_rank_update(weight, torch.ones(3, 1), right, backend=backend)
    expected = torch.ones(3, 50, dtype=dtype)
    expected[:, place] = float("nan")
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ops.available_backends("cpu"))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 2.0**-17], ids=["normal", "small"])
def test_stochastic_rounding_is_right_on_average(backend, dtype, magnitude):
    # 3/8 of the way from one number of the dtype to the next; 2^-17 is below float16's normal numbers.
    spacing = max(torch.finfo(dtype).eps * magnitude, 2.0**-24 if dtype == torch.float16 else 0.0)
    shift = 0.375 * spacing
    weight = torch.full((300, 1000), magnitude, dtype=dtype)
    weight[150:] *= -1
    left = torch.ones(300, 1)
    left[150:] *= -1
    ops.low_rank_update(weight, left, torch.full((1, 1000), shift), rounding="stochastic", seed=3, backend=backend)
    ups = (weight.double().abs() - magnitude) / spacing
    assert set(ups.unique().tolist()) == {0.0, 1.0}, "not one of the two neighbours"
    deviation = (0.375 * 0.625 / ups.numel()) ** 0.5
    assert abs(ups.mean().item() - 0.375) < 5 * deviation
    # Neighbouring rows and columns must not round together.
    for pair in ((ups[1:], ups[:-1]), (ups[:, 1:], ups[:, :-1])):
        correlation = torch.corrcoef(torch.stack([each.flatten() for each in pair]))[0, 1].item()
        assert abs(correlation) < 5 / ups.numel() ** 0.5


@pytest.mark.parametrize("backend", ops.available_backends("cpu"))
def test_stochastic_rounding_depends_on_the_seed_alone(backend):
    start, left, right = random_update(60, 70, 3, torch.bfloat16)
    results = []
    for seed in (5, 5, 6):
        weights = [start.clone(), start.clone()]
        factors = ([left, left], [right, right])
        ops.low_rank_update(weights, *factors, rounding="stochastic", seed=seed, backend=backend)
        results.append(torch.stack(weights))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0][0], results[0][1]), "two layers had the same random numbers"


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_layers_of_different_shapes_in_one_call(backend):
    shapes = (
        (30, 50, 2, torch.bfloat16),
        (63, 123, 300, torch.float32),
        (5, 9, 0, torch.float16),
        (8, 8, 1, torch.float16),
    )
    updates = [random_update(*shape) for shape in shapes]
    exact = [reference.updated_weight(*update, scale=-2.0) for update in updates]
    weights, lefts, rights = zip(*updates, strict=True)
    ops.low_rank_update(weights, lefts, rights, scale=-2.0, backend=backend)
    for weight, expected in zip(weights, exact, strict=True):
        torch.testing.assert_close(weight, expected.to(weight.dtype), rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view",
    [
        lambda memory: memory.T,
        lambda memory: memory[:, ::2],
        lambda memory: memory[1:40:3, 5:50],
        lambda memory: memory[4:5],
    ],
    ids=["transposed", "columns", "part", "one row"],
)
def test_views_of_weights(backend, view):
    memory = torch.randn(60, 80)
    outside = memory.clone()
    weight = view(memory)
    left, right = torch.randn(weight.shape[0], 3), torch.randn(3, weight.shape[1])
    exact = reference.updated_weight(weight, left, right)
    ops.low_rank_update(weight, left, right, backend=backend)
    torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-5)
    view(outside).copy_(weight)
    assert torch.equal(memory, outside), "numbers outside the view changed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, columns, rank", [(0, 5, 2), (5, 0, 2), (5, 5, 0)])
def test_nothing_to_update(backend, rows, columns, rank):
    weight, left, right = random_update(rows, columns, rank, torch.bfloat16)
    before = weight.clone()
    ops.low_rank_update(weight, left, right, backend=backend)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subtracting_an_update_in_float32_brings_the_weight_back(backend):
    start, left, right = random_update(50, 60, 4, torch.float32)
    weight = start.clone()
    ops.low_rank_update(weight, left, right, backend=backend)
    assert (weight - start).abs().max() > 0.1
    ops.low_rank_update(weight, left, right, scale=-1.0, backend=backend)
    torch.testing.assert_close(weight, start, rtol=0, atol=1e-5)
