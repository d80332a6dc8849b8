"""The Triton kernels in Triton's interpreter, against float64; test_kernels.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in the child process of test_kernels.py", allow_module_level=True)

import torch
import triton
import triton.language as tl
from rocr_kernels import _common, grouped_second_moment, low_rank_update, second_moment
from rocr_kernels.grouped_second_moment import accumulate_grouped_second_moment, make_parts
from rocr_kernels.low_rank_update import LowRankPlan, update_low_rank
from rocr_kernels.second_moment import accumulate_second_moments
from rocr_kernels.second_moment_tiles import tile_position
from torch import Tensor

from rocr.ops import reference
from rocr.ops.triton_backend import grouped_second_moment_op, low_rank_update_op, second_moments_op

ERROR_OVER_PLAIN = 1.25
"""Bound of a kernel's error over that of plain float32 sums, which every machine rounds alike."""

SPLITS_OF_ONE_TOKEN = torch.finfo(torch.float32).eps
"""Relative error of the bf16 splits of a float32 key, where a plain sum has one rounding."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(*shapes: tuple[int, ...], always: tuple[int, int, int]) -> list[Any]:
    """Shapes with each of DTYPES; of each, so many of the last shapes are in every run, and the rest is slow."""
    found = []
    for dtype, count in zip(DTYPES, always, strict=True):
        marks = [pytest.mark.slow] * (len(shapes) - count) + [()] * count
        found += [pytest.param(*shape, dtype, marks=mark) for shape, mark in zip(shapes, marks, strict=True)]
    return found


def with_dtype(config: str) -> Any:
    dtype = torch.float32 if config.endswith("_bf16_splits") else torch.bfloat16
    return pytest.param(config, dtype, marks=pytest.mark.slow if config.endswith("_small") else ())


UNALIGNED = cases((1, 1), (1, 123), (123, 1), (63, 63), always=(2, 4, 1))
GROUPED = [with_dtype(config) for config in second_moment.CONFIGS if config.startswith("pointers")]
ODD = cases((123, 200, 16), (70, 136, 17), (70, 136, 40), (63, 123, 1), (1, 1, 1), (8, 72, 100), always=(3, 5, 2))


def plain_sum(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, one product added after the other.

    Libraries sum in orders of their own: on some chips torch's matrix products are several times as exact.
    """
    total = torch.zeros(len(left), right.shape[1])
    for column, row in zip(left.float().T, right.float(), strict=True):
        total += column[:, None] * row
    return total


def second_moment_errors(totals: list[Tensor], keys: list[Tensor], config: str | None) -> tuple[float, float]:
    """Error of the kernel and of plain sums, relative to the exact lower triangles; totals are written to."""
    exact = [total.double() + reference.second_moment(each) for total, each in zip(totals, keys, strict=True)]
    plain = [total + plain_sum(each.T, each) for total, each in zip(totals, keys, strict=True)]
    accumulate_second_moments(totals, keys, second_moment.CONFIGS[config] if config else None)

    def error(results: list[Tensor]) -> float:
        wrong = torch.stack([(each.double() - right).tril() for each, right in zip(results, exact, strict=True)])
        return (wrong.norm() / torch.stack(exact).tril().norm()).item()

    return error(totals), error(plain)


@pytest.mark.parametrize(("config", "dtype"), map(with_dtype, second_moment.CONFIGS), ids=str)
def test_second_moments_of_layers_of_odd_shapes(config: str, dtype: torch.dtype) -> None:
    width = 72 if dtype == torch.float32 else 264
    keys = [torch.randn(123, width).to(dtype) for _ in range(2)]
    totals = [torch.randn(width, width) for _ in range(2)]
    ours, of_plain = second_moment_errors(totals, keys, config)
    assert ours <= ERROR_OVER_PLAIN * of_plain


@pytest.mark.parametrize(("tokens", "width", "dtype"), UNALIGNED)
def test_second_moments_without_alignment(tokens: int, width: int, dtype: torch.dtype) -> None:
    layers = 6 if width == 1 else 2  # the rounding of a single number is luck
    totals, keys = torch.randn(layers, width, width), torch.randn(layers, tokens, width).to(dtype)
    ours, of_plain = second_moment_errors(list(totals), list(keys), None)
    assert ours <= ERROR_OVER_PLAIN * of_plain + SPLITS_OF_ONE_TOKEN


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles share even a few tokens among programs, since the interpreter is slow."""
    monkeypatch.setattr(_common, "MINIMUM_SPLIT_TOKENS", 64)


@pytest.mark.parametrize("config", [name for name in second_moment.CONFIGS if not name.endswith("_bf16_splits")])
@pytest.mark.parametrize("tokens", [pytest.param(70, marks=pytest.mark.slow), 300])
def test_second_moment_keeps_every_bit_around_and_above(
    config: str, tokens: int, short_splits: None, left_alone: Callable[[Tensor], Tensor]
) -> None:
    memory = left_alone(torch.empty(140, 160))
    total = memory[2:138, 8:144]
    lower = torch.ones(136, 136, dtype=torch.bool).tril()
    total[lower] = torch.randn(lower.sum())
    keys = torch.full((tokens, 160), torch.nan, dtype=torch.bfloat16)
    keys[:, 8:144] = torch.randn(tokens, 136)
    before, bits = memory.clone(), memory.view(torch.int32)
    accumulate_second_moments([total], [keys[:, 8:144]], second_moment.CONFIGS[config])
    written = torch.zeros(140, 160, dtype=torch.bool)
    written[2:138, 8:144] = lower
    assert memory[written].isfinite().all()
    assert torch.equal(bits[~written], before.view(torch.int32)[~written])


@pytest.mark.parametrize("config", ["tma_wide", "pointers"])
def test_second_moments_of_tiles_that_share_their_tokens(config: str, short_splits: None) -> None:
    tokens, tiles = (5000, 2) if config == "tma_wide" else (300, 1)
    assert _common.make_schedule(tiles, tokens, _common.INTERPRETER_PROGRAMS, 64).splits > 1
    keys = torch.randn(tokens, 64).to(torch.bfloat16)
    ours, of_plain = second_moment_errors([torch.randn(64, 64)], [keys], config)
    assert ours <= ERROR_OVER_PLAIN * of_plain


@pytest.mark.parametrize(("config", "held"), [("tma_small", second_moment.CHUNK_TOKENS), ("pointers", 512)])
def test_second_moment_of_more_tokens_than_an_accumulator_holds(
    monkeypatch: pytest.MonkeyPatch, config: str, held: int
) -> None:
    monkeypatch.setattr(second_moment, "CHUNK_TOKENS", held)  # fewer where the interpreter is slow
    keys = torch.randn(held + 808, 8).to(torch.float16)
    ours, of_plain = second_moment_errors([torch.zeros(8, 8)], [keys], config)
    assert ours <= ERROR_OVER_PLAIN * of_plain


def test_second_moment_of_float32_keys_has_the_error_of_float32() -> None:
    ours, of_plain = second_moment_errors([torch.zeros(32, 32)], [torch.randn(1000, 32)], None)
    assert ours <= ERROR_OVER_PLAIN * of_plain


def grouped_errors(totals: Tensor, keys: Tensor, offsets: list[int], config: str | None) -> tuple[float, float]:
    """Error of the kernel and of plain sums over the groups, relative to the exact triangles; totals are written to."""
    groups = [keys[start:end] for start, end in pairwise(offsets)]
    exact = torch.stack(
        [total.double() + reference.second_moment(each) for total, each in zip(totals, groups, strict=True)]
    ).tril()
    plain = torch.stack([total + plain_sum(each.T, each) for total, each in zip(totals, groups, strict=True)]).tril()
    upper = totals.triu(1)
    accumulate_grouped_second_moment(totals, keys, offsets, second_moment.CONFIGS[config] if config else None)
    assert torch.equal(totals.triu(1), upper)
    return tuple(((each.tril() - exact).norm() / exact.norm()).item() for each in (totals, plain))


@pytest.mark.parametrize(("config", "dtype"), GROUPED, ids=str)
def test_grouped_second_moments_of_odd_groups(config: str, dtype: torch.dtype) -> None:
    width = 72 if dtype == torch.float32 else 136
    offsets = [0, 0, 33, 34, 34, 123]
    ours, of_plain = grouped_errors(torch.randn(5, width, width), torch.randn(123, width).to(dtype), offsets, config)
    assert ours <= ERROR_OVER_PLAIN * of_plain


@pytest.mark.parametrize(("tokens", "width", "dtype"), UNALIGNED)
def test_grouped_second_moments_without_alignment(tokens: int, width: int, dtype: torch.dtype) -> None:
    offsets = [0, tokens // 3, tokens // 3, tokens]
    ours, of_plain = grouped_errors(torch.randn(3, width, width), torch.randn(tokens, width).to(dtype), offsets, None)
    assert ours <= ERROR_OVER_PLAIN * of_plain + SPLITS_OF_ONE_TOKEN


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float32], ids=str)
def test_grouped_second_moments_of_a_group_of_several_parts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(grouped_second_moment, "MINIMUM_SPLIT_TOKENS", 64)
    offsets = [0, 10, 250, 310, 500]
    assert len(make_parts(offsets, 1, _common.INTERPRETER_PROGRAMS, 64).split) == 2
    ours, of_plain = grouped_errors(torch.randn(4, 24, 24), torch.randn(500, 24).to(dtype), offsets, None)
    assert ours <= ERROR_OVER_PLAIN * of_plain


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32], ids=str)
def test_a_group_of_more_tokens_than_an_accumulator_holds(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(grouped_second_moment, "CHUNK_TOKENS", 128)  # fewer, since the interpreter is slow
    monkeypatch.setattr(grouped_second_moment, "SPLIT_BYTES", 6 * 8 * 256)  # float32 keys take two launches
    ours, of_plain = grouped_errors(torch.zeros(2, 8, 8), torch.randn(455, 8).to(dtype), [0, 125, 455], None)
    assert ours <= ERROR_OVER_PLAIN * of_plain


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_a_group_reads_its_own_rows_and_writes_its_own_triangle(
    split: bool, monkeypatch: pytest.MonkeyPatch, left_alone: Callable[[Tensor], Tensor]
) -> None:
    if split:
        monkeypatch.setattr(grouped_second_moment, "MINIMUM_SPLIT_TOKENS", 32)
    memory = left_alone(torch.empty(3 * 140, 160)).view(3, 140, 160)
    totals = memory[:, 2:138, 8:144]
    lower = torch.ones(136, 136, dtype=torch.bool).tril()
    totals[1, lower] = 0.0
    keys = torch.full((300, 160), torch.nan, dtype=torch.bfloat16)
    keys[70:200, 8:144] = torch.randn(130, 136)
    before, bits = memory.clone(), memory.view(torch.int32)
    accumulate_grouped_second_moment(totals, keys[:, 8:144], [70, 70, 200, 200])
    written = torch.zeros(3, 140, 160, dtype=torch.bool)
    written[1, 2:138, 8:144] = lower
    assert memory[written].isfinite().all() and memory[written].any()
    assert torch.equal(bits[~written], before.view(torch.int32)[~written])


@triton.jit
def _list_tiles(target, width, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    tile = tl.arange(0, 2048)
    layer, row, column = tile_position(tile, width, ROWS, COLUMNS, GROUP)
    tl.store(target + 3 * tile, layer, mask=tile < tiles)
    tl.store(target + 3 * tile + 1, row, mask=tile < tiles)
    tl.store(target + 3 * tile + 2, column, mask=tile < tiles)


@pytest.mark.parametrize(("rows", "columns", "group"), [(128, 256, 8), (128, 128, 8), (64, 128, 16)])
@pytest.mark.parametrize("blocks", [1, 2, 8, 9, 28])
def test_tiles_cover_the_lower_triangle_once(rows: int, columns: int, group: int, blocks: int) -> None:
    width = blocks * columns
    tiles = 2 * blocks * (blocks + 1) // 2 * (columns // rows)
    target = torch.empty(tiles, 3, dtype=torch.int32)
    _list_tiles[(1,)](target, width, tiles, ROWS=rows, COLUMNS=columns, GROUP=group)
    expected = {
        (layer, row, column)
        for layer in range(2)
        for row in range(0, width, rows)
        for column in range(0, row // columns * columns + 1, columns)
    }
    assert set(map(tuple, target.tolist())) == expected
    assert tiles == len(expected)


def update_errors(
    weights: list[Tensor], lefts: list[Tensor], rights: list[Tensor], scale: float, config: str | None
) -> tuple[float, float]:
    """Error of the kernel and of a plain float32 sum rounded once; weights are written to."""
    layers = list(zip(weights, lefts, rights, strict=True))
    exact = [reference.updated_weight(*layer, scale) for layer in layers]
    plain = [(weight.float() + scale * plain_sum(left, right)).to(weight.dtype) for weight, left, right in layers]
    LowRankPlan(weights, lefts, rights, low_rank_update.CONFIGS[config] if config else None).run(scale, False, 0)

    def error(results: list[Tensor]) -> float:
        return max((each.double() - right).norm().item() for each, right in zip(results, exact, strict=True))

    return error(weights), error(plain)


def random_update(rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, columns).to(dtype), torch.randn(rows, rank), torch.randn(rank, columns) / rank


@pytest.mark.parametrize(("rows", "columns", "rank", "dtype"), ODD)
def test_low_rank_updates_of_layers_of_odd_shapes(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    layers = [random_update(rows, columns, rank, dtype) for _ in range(2)]
    ours, of_plain = update_errors(*map(list, zip(*layers, strict=True)), scale=0.7, config=None)
    assert ours <= ERROR_OVER_PLAIN * of_plain


@pytest.mark.parametrize("config", low_rank_update.CONFIGS)
def test_every_configuration_updates_a_weight_as_it_lies(config: str) -> None:
    shape = low_rank_update.CONFIGS[config]
    dtype = torch.float32 if shape.bf16_splits == 3 else torch.bfloat16
    weight, left, right = random_update(72, 104, 9, dtype)
    # Column strips move through TMA, which needs unit stride along a row.
    weight = weight if shape.kind == "column_strips" else weight.T.contiguous().T
    ours, of_plain = update_errors([weight], [left], [right], 1.0, config)
    assert ours <= ERROR_OVER_PLAIN * of_plain


FAR = 2**30 + 8
"""A stride with which the third row begins beyond 2**31 numbers."""


def far_rows(matrix: Tensor) -> Tensor:
    """A copy of three rows that lie far apart, in memory of which a few pages exist."""
    try:
        memory = torch.empty(2 * FAR + matrix.shape[1], dtype=matrix.dtype)
    except RuntimeError:
        pytest.skip("the system gives no memory that is not used")
    return memory.as_strided(matrix.shape, (FAR, 1)).copy_(matrix)


@pytest.mark.parametrize("config", [name for name in low_rank_update.CONFIGS if not name.startswith("column_strips")])
@pytest.mark.parametrize("of", ["weight", "left", "right"])
def test_rows_of_an_update_may_lie_far_apart(config: str, of: str) -> None:
    dtype = torch.float32 if low_rank_update.CONFIGS[config].bf16_splits == 3 else torch.bfloat16
    operands = dict(zip(("weight", "left", "right"), random_update(3, 24, 3, dtype), strict=True))
    near = {name: operand.clone() for name, operand in operands.items()}
    operands[of] = far_rows(operands[of])
    for each in (operands, near):
        LowRankPlan(*([operand] for operand in each.values()), low_rank_update.CONFIGS[config]).run(1.0, False, 0)
    assert torch.equal(operands["weight"], near["weight"])


@pytest.mark.parametrize("of", ["total", "keys"])
def test_rows_of_a_second_moment_may_lie_far_apart(of: str) -> None:
    operands = {"total": torch.randn(3, 3), "keys": torch.randn(3, 3).to(torch.bfloat16)}
    near = {name: operand.clone() for name, operand in operands.items()}
    operands[of] = far_rows(operands[of])
    for each in (operands, near):
        accumulate_second_moments([each["total"]], [each["keys"]], second_moment.CONFIGS["pointers"])
    assert torch.equal(operands["total"].tril(), near["total"].tril())


def test_layers_of_several_shapes_and_dtypes_in_one_call() -> None:
    layers = [random_update(40, 64, 3, torch.bfloat16), random_update(9, 17, 3, torch.float16)]
    layers += [random_update(40, 64, 3, torch.bfloat16), random_update(40, 64, 2, torch.float32)]
    exact = [reference.updated_weight(*layer) for layer in layers]
    update_low_rank(*map(list, zip(*layers, strict=True)))
    for (weight, _, _), right in zip(layers, exact, strict=True):
        assert (weight.double() - right).abs().max() <= torch.finfo(weight.dtype).eps * right.abs().max()


@pytest.mark.parametrize("rank", [2, 40])
def test_an_update_writes_its_weight_alone(rank: int) -> None:
    memory = torch.full((44, 96), torch.nan, dtype=torch.bfloat16)
    memory[2:42, 8:88] = torch.randn(40, 80)
    update_low_rank([memory[2:42, 8:88]], [torch.randn(40, rank)], [torch.randn(rank, 80)])
    written = torch.zeros(44, 96, dtype=torch.bool)
    written[2:42, 8:88] = True
    assert memory[written].isfinite().all()
    assert memory[~written].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("value", "step", "part"), [(1.0, 1.0, 0.3), (0.0, 2.0**-24, 0.25)])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype, value: float, step: float, part: float) -> None:
    if value:
        step = torch.finfo(dtype).eps
    elif dtype == torch.bfloat16:
        pytest.skip("bfloat16 has no fixed spacing there")
    weights = [torch.full((128, 256), value, dtype=dtype) for _ in range(2)]
    lefts, rights = [torch.full((128, 1), step)] * 2, [torch.full((1, 256), part + 5 * (not value))] * 2
    low = value + step * 5 * (not value)
    update_low_rank(weights, lefts, rights, stochastic=True, seed=3)
    for weight in weights:
        assert set(weight.double().unique().tolist()) == {low, low + step}
        share = (weight.double() > low).double().mean().item()
        assert share == pytest.approx(part, abs=5 * (part * (1 - part) / weight.numel()) ** 0.5)
    assert not torch.equal(*weights), "two layers must not round alike"


def test_stochastic_rounding_repeats_for_one_seed_whatever_the_tiles() -> None:
    results = []
    for config, seed in (("resident_16", 3), ("bf16_splits", 3), ("resident_16", 4)):
        weight = torch.ones(70, 136, dtype=torch.bfloat16)
        plan = LowRankPlan(
            [weight], [torch.full((70, 1), 2.0**-10)], [torch.ones(1, 136)], low_rank_update.CONFIGS[config]
        )
        plan.run(1.0, True, seed)
        results.append(weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_stochastic_rounding_is_golden(philox_update: Any, joint_digest: Callable[..., str]) -> None:
    update = philox_update
    update_low_rank(update.weights, update.lefts, update.rights, update.scale, True, update.seed)
    assert joint_digest(update.weights) == update.digest


def test_updates_without_numbers_change_nothing() -> None:
    weight = torch.randn(5, 7)
    before = weight.clone()
    update_low_rank(
        [weight, torch.empty(0, 3)], [torch.empty(5, 0), torch.empty(0, 2)], [torch.empty(0, 7), torch.empty(2, 3)]
    )
    assert torch.equal(weight, before)


@pytest.mark.slow  # the compiled function below takes the same operators through torch's tracing
def test_the_operators_are_what_torch_expects_of_them() -> None:
    checks = ("test_schema", "test_faketensor")
    totals, keys = [torch.zeros(8, 8), torch.zeros(8, 8)], [torch.randn(5, 8), torch.randn(5, 8)]
    torch.library.opcheck(second_moments_op, (totals, keys), test_utils=checks)
    torch.library.opcheck(grouped_second_moment_op, ([torch.zeros(2, 8, 8)], keys[0], [0, 2, 5]), test_utils=checks)
    weight, left, right = random_update(8, 8, 2, torch.bfloat16)
    torch.library.opcheck(low_rank_update_op, ([weight], [left], [right], 1.0, False, 0), test_utils=checks)


def test_a_compiled_function_updates_in_place() -> None:
    def edit(weight: Tensor, left: Tensor, right: Tensor, total: Tensor) -> Tensor:
        low_rank_update_op([weight], [left * 2], [right], 1.0, False, 0)
        second_moments_op([total], [weight])
        return weight.float().sum() + total.sum()

    weight, left, right = random_update(16, 8, 2, torch.bfloat16)
    total = torch.zeros(8, 8)
    other_weight, other_total = weight.clone(), total.clone()
    expected = edit(weight, left, right, total)
    result = torch.compile(edit, backend="aot_eager", fullgraph=True)(other_weight, left, right, other_total)
    assert torch.equal(result, expected)
    assert torch.equal(other_weight, weight)
    assert torch.equal(other_total, total)
