import pytest
import torch

from rocr import ops
from rocr.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [name for name in ops.available_backends("cpu") if name != "reference"]
SHAPES = ((1, 1), (2, 63), (123, 1), (63, 123), (257, 96), (300, 97), (1000, 200))

ERROR_OVER_TORCH = 1.1
"""Bound of a backend's error over that of addmm_ in float32; measured at most 1.02."""


def error(total, exact):
    return (total.double() - exact).tril().norm().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, size", SHAPES)
def test_error_is_that_of_torch(guarded, backend, dtype, tokens, size):
    keys = torch.randn(tokens, size).to(dtype)
    start = torch.randn(size, size)
    exact = start.double() + reference.second_moment(keys)
    by_torch = start.addmm(keys.float().T, keys.float())
    total = guarded(start)
    ops.accumulate_second_moment(total, guarded(keys), backend=backend)
    rounding = torch.finfo(torch.float32).eps * exact.tril().norm().item()
    assert error(total, exact) <= ERROR_OVER_TORCH * error(by_torch, exact) + rounding
    assert torch.equal(total.triu(1), start.triu(1)), "the upper triangle was touched"


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tokens_than_an_accumulator_may_hold(backend):
    # Equal keys: one float32 number as accumulator is off by 2e-4 here, shorter ones are not.
    keys = torch.full((3 * 8192 + 5, 65), 0.1)
    total = torch.zeros(65, 65)
    ops.accumulate_second_moment(total, keys, backend=backend)
    exact = reference.second_moment(keys)
    assert ((total.double() - exact).tril() / exact).abs().max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_add_up(backend):
    parts = [torch.randn(40, 33) for _ in range(3)]
    total = torch.zeros(33, 33)
    for part in parts:
        ops.accumulate_second_moment(total, part, backend=backend)
    exact = sum(reference.second_moment(part) for part in parts)
    torch.testing.assert_close(total.tril().double(), exact.tril(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens, size", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_add(backend, tokens, size):
    total = torch.randn(size, size)
    before = total.clone()
    ops.accumulate_second_moment(total, torch.randn(tokens, size), backend=backend)
    assert torch.equal(total, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view",
    [
        lambda keys: keys[:, ::2],
        lambda keys: keys[::3],
        lambda keys: keys.T,
        lambda keys: keys[:1].expand(30, -1),
        lambda keys: keys[3:4, 5:45],
    ],
    ids=["columns", "rows", "transposed", "expanded", "one row"],
)
def test_views_of_keys(backend, view):
    keys = view(torch.randn(60, 60))
    total = torch.zeros(keys.shape[1], keys.shape[1])
    ops.accumulate_second_moment(total, keys, backend=backend)
    exact = reference.second_moment(keys).tril()
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_total_that_is_a_transposed_view(backend):
    memory = torch.zeros(40, 40)
    keys = torch.randn(7, 40)
    ops.accumulate_second_moment(memory.T, keys, backend=backend)
    torch.testing.assert_close(memory.T.double(), reference.second_moment(keys).tril(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ops.available_backends("cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_every_bit_above_the_diagonal_stays(left_alone, backend, dtype, transposed):
    size = 800  # more than one panel, block and tile of every backend
    total = left_alone(torch.empty(size, size))
    total = total.T if transposed else total
    lower = torch.ones(size, size, dtype=torch.bool).tril()
    total[lower] = 0.0
    before = total.clone()
    ops.accumulate_second_moment(total, torch.randn(40, size).to(dtype), backend=backend)
    upper = torch.where(lower, 0, total.view(torch.int32))
    assert torch.equal(upper, torch.where(lower, 0, before.view(torch.int32)))
    assert total[lower].isfinite().all() and total[lower].any()


def test_symmetrize_copies_every_bit(left_alone):
    total = left_alone(torch.empty(1100, 1100))
    lower = total.view(torch.int32).tril()
    ops.symmetrize(total)
    bits = total.view(torch.int32)
    assert torch.equal(bits.tril(), lower) and torch.equal(bits, bits.T)


def test_a_key_that_is_not_finite_shows_in_its_row_and_column_only():
    keys = torch.randn(50, 20)
    keys[3, 7] = float("nan")
    total = ops.symmetrize(ops.accumulate_second_moment(torch.zeros(20, 20), keys))
    spoiled = torch.zeros(20, 20, dtype=torch.bool)
    spoiled[7], spoiled[:, 7] = True, True
    assert torch.equal(total.isnan(), spoiled)


def test_symmetrize_mirrors_the_lower_triangle():
    total = torch.randn(9, 9)
    lower = total.tril()
    assert ops.symmetrize(total) is total
    assert torch.equal(total.tril(), lower)
    assert torch.equal(total, total.T)
