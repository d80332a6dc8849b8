"""The fixture `compare`, which times rocr and its baselines in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

Compare = Callable[..., None]

SPINNING_SECONDS = 0.1
"""Worker threads of a BLAS spin after a call, for tens of milliseconds with OpenBLAS, and use the processor."""


def warm_up(function: Callable[[], object]) -> None:
    """Wait until the threads of other libraries sleep, then call a function, so that its own threads are awake."""
    time.sleep(SPINNING_SECONDS)
    function()


def warm_seconds(function: Callable[[], object]) -> float:
    """Return the seconds of a call that follows an untimed call of the same function."""
    warm_up(function)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.fixture
def compare(benchmark: BenchmarkFixture) -> Compare:
    """Return a function that times a function of rocr and its baselines.

    Every round times each baseline once before rocr, so that changes of the machine's speed affect all of them. Each
    timed call follows an untimed one of the same function.
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
