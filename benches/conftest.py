"""The fixture that times rocr against its baselines in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

Compare = Callable[..., None]

SECONDS_OF_SPINNING = 0.1
"""Threads of a BLAS go on asking for work after a call, for tens of milliseconds with OpenBLAS."""


def warm_up(function: Callable[[], object]) -> None:
    """Call a function when the threads of others sleep, so that its own are awake for the next call."""
    time.sleep(SECONDS_OF_SPINNING)
    function()


def warm_seconds(function: Callable[[], object]) -> float:
    """Return the time of a call that follows another of the same function."""
    warm_up(function)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.fixture
def compare(benchmark: BenchmarkFixture) -> Compare:
    """Time a function of rocr; every round first times each baseline once, so that all see the same machine.

    Each timed call follows an untimed one of the same function.
    """
    torch.manual_seed(0)

    def run(
        function: Callable[[], object],
        baselines: dict[str, Callable[[], object]],
        operation: str,
        size: str,
        rounds: int,
        bytes_moved: int = 0,
        operations: int = 0,
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in baselines}

        def time_baselines() -> None:
            for name, baseline in baselines.items():
                times[name].append(warm_seconds(baseline))
            warm_up(function)

        benchmark.pedantic(function, setup=time_baselines, rounds=rounds)
        benchmark.extra_info.update(operation=operation, size=size)
        median = benchmark.stats.stats.median
        if operations:
            benchmark.extra_info["gflops"] = operations / median / 1e9
        if bytes_moved:
            benchmark.extra_info["gb_per_s"] = bytes_moved / median / 1e9
        benchmark.extra_info["baselines"] = {
            name: {"median": statistics.median(measured), "ratio": statistics.median(measured) / median}
            for name, measured in times.items()
        }

    return run
