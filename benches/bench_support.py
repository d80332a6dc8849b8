"""Time the update of a weight that is half zeros, which it keeps, against the dense update of the same weight."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from conftest import Compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from rocr import ops
from rocr.ops import reference
from rocr.solve.metric import WhitenedMetric
from rocr.solve.solve import solve_layer

ROWS, COLUMNS = 4096, 14336
RIDGE = 1.0
ROUNDS = 7
CHECKED_ROWS = 20


@dataclass(frozen=True)
class Layer:
    """A layer to edit.

    Attributes:
        weight: (d_out, d_in) bfloat16, half zeros in the pattern 2:4.
        keys: (n, d_in) float32.
        residuals: (n, d_out) float32.
        metric: The metric of a second moment, as an edit holds it: the Cholesky factor of M⁻¹.
    """

    weight: Tensor
    keys: Tensor
    residuals: Tensor
    metric: WhitenedMetric

    def update(self, keep_zeros: bool, product: Tensor | None = None) -> None:
        """Solve the update of the layer and add it to the weight.

        Args:
            keep_zeros: Whether the zeros are kept; the support is read from the weight then.
            product: K M, if it is known.
        """
        if product is None:
            support = self.weight.bool() if keep_zeros else None
            factors = solve_layer(self.keys, self.residuals, self.metric, RIDGE, support=support).factors
            left, right = factors.left, factors.right
        elif keep_zeros:
            right = product
            left = ops.solve_on_support(self.weight, self.keys, self.residuals, right, RIDGE)
        else:
            left, right = ops.solve_update(self.keys, self.residuals, _Known(product), RIDGE)
        ops.low_rank_update(self.weight, left, right, scale=1e-6, keep_zeros=keep_zeros)


@dataclass(frozen=True)
class _Known:
    """A metric whose product with the keys is known."""

    product: Tensor

    def apply(self, _: Tensor) -> Tensor:
        """Return K M."""
        return self.product


def layer_of(n: int) -> Layer:
    """Return a layer with n keys. The factor of the metric is not that of a model: its values cost no time."""
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    fours = weight.abs().unflatten(1, (-1, 4))
    kept = torch.zeros(fours.shape, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True)
    factor = torch.randn(COLUMNS, COLUMNS, generator=generator).mul_(1e-3).tril_()
    factor.diagonal().fill_(3.0)
    keys, residuals = torch.randn(n, COLUMNS, generator=generator), torch.randn(n, ROWS, generator=generator)
    return Layer((weight * kept.flatten(1)).bfloat16(), keys, residuals, WhitenedMetric(factor, 10.0, 1.0))


def assert_right(layer: Layer, product: Tensor) -> None:
    """Assert that some rows are the least squares of float64, and that every zero stays."""
    found = ops.solve_on_support(layer.weight, layer.keys, layer.residuals, product, RIDGE)
    rows = torch.randperm(ROWS)[:CHECKED_ROWS]
    exact = reference.solve_on_support(layer.weight[rows], layer.keys, layer.residuals[:, rows], product, RIDGE)
    error = (found[rows] - exact).norm() / exact.norm()
    assert error < 1e-5, f"relative error {error:.3g}"
    zeros = layer.weight == 0
    layer.update(keep_zeros=True, product=product)
    assert torch.equal(layer.weight == 0, zeros)


def processor_seconds(function: Callable[[], None]) -> float:
    """Return the median processor time of a call, of all threads: other programs change it less than the duration."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return statistics.median(found)


@pytest.mark.parametrize("n", [1, 4, 8])
def bench_update_that_keeps_zeros(compare: Compare, benchmark: BenchmarkFixture, n: int) -> None:
    layer = layer_of(n)
    compare(
        lambda: layer.update(keep_zeros=True),
        {"the dense update": lambda: layer.update(keep_zeros=False)},
        operation=f"metric, solve and update that keep zeros, n = {n}",
        size=f"{ROWS} × {COLUMNS}",
        rounds=ROUNDS,
    )
    times = [processor_seconds(partial(layer.update, each)) for each in (True, False)]
    benchmark.extra_info["processor_seconds"] = dict(zip(("rocr", "the dense update"), times, strict=True))


@pytest.mark.parametrize("n", [1, 4, 8])
def bench_solve_and_update(compare: Compare, benchmark: BenchmarkFixture, n: int) -> None:
    layer = layer_of(n)
    product = layer.metric.apply(layer.keys)
    assert_right(layer, product)
    compare(
        lambda: layer.update(keep_zeros=True, product=product),
        {"the dense ones": lambda: layer.update(keep_zeros=False, product=product)},
        operation=f"solve and update that keep zeros, K M known, n = {n}",
        size=f"{ROWS} × {COLUMNS}",
        rounds=ROUNDS,
    )
    times = [processor_seconds(partial(layer.update, each, product)) for each in (True, False)]
    benchmark.extra_info["processor_seconds"] = dict(zip(("rocr", "the dense ones"), times, strict=True))
