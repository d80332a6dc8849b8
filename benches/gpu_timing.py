"""Time functions on a GPU against each other in one run, and say what they ran on."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Times:
    """Seconds of one function over the rounds of a run."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass
class Row:
    """One line of the results.

    Attributes:
        work, size: what was done, on what.
        ours: the name of rocr's fastest way among `times`.
        baseline: the strongest way of others, by which the ratio is taken.
        at_least, aim: the ratio that is required, and the one that is hoped for.
        error: of each way, relative to float64, in the norm of the result.
        rate: what else the times mean: TFLOP/s of useful work, GB/s, or a share.
        note: what a reader must know of the way it was measured.
    """

    work: str
    size: str
    times: dict[str, Times]
    ours: str
    baseline: str
    at_least: float
    aim: float
    error: dict[str, float] = field(default_factory=dict)
    rate: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster rocr is than the baseline."""
        return self.times[self.baseline].median / self.times[self.ours].median

    def as_json(self) -> dict[str, Any]:
        """Everything, with the ratio."""
        return asdict(self) | {"ratio": self.ratio}


def fastest(times: dict[str, Times], names: Sequence[str]) -> str:
    """Return the name with the smallest median."""
    return min(names, key=lambda name: times[name].median)


def interleave(
    functions: dict[str, Callable[[int], object]],
    device: torch.device,
    rounds: int,
    few: Sequence[str] = (),
    warm_up: bool = True,
) -> dict[str, Times]:
    """Time every function once a round, so that all see the same clocks; those in `few` in two rounds only.

    A function gets the number of the round, to take another buffer each time: one that is in the L2 cache from the
    round before would be too fast. Without warm_up, every function has run already.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values() if warm_up else ():
        function(0)
    _synchronize(device)
    for number in range(rounds):
        for name, function in functions.items():
            if name not in few or number < 2:
                seconds[name].append(_seconds(function, number, device))
    return {name: _summary(values) for name, values in seconds.items()}


def _seconds(function: Callable[[int], object], number: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function(number)
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    function(number)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def _summary(values: list[float]) -> Times:
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return Times(statistics.median(values), fifths[0], fifths[-1], len(values))


def graph(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Record a function in a CUDA graph and return what replays it; elsewhere the function itself."""
    if device.type != "cuda":
        return function
    function()
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        function()
    return recorded.replay


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference to the exact result, over the norm of that."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "nvcc": _output(["nvcc", "--version"]).splitlines()[-1:],
    }
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["chip"] = properties.name
        about["multiprocessors"] = properties.multi_processor_count
        about["memory_gib"] = round(properties.total_memory / 2**30, 1)
        about["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    else:
        about["chip"] = platform.processor() or platform.machine()
    return about


def _output(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
