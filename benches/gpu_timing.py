"""Time functions on a GPU against each other in one run, and describe the machine."""

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
    """Median and percentiles of the seconds of one function over the rounds of a run."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass
class Row:
    """One line of the results.

    Attributes:
        work: Name of the operation.
        size: Shapes and dtypes.
        times: Times of each function by name.
        ours: Name in `times` of the fastest function of rocr.
        baseline: Name in `times` of the function that the ratio is relative to.
        at_least: Required ratio.
        aim: Hoped-for ratio.
        error: Error of each function relative to float64, in the norm of the result.
        rate: Numbers derived from the times: TFLOP/s of useful work, GB/s, or a share.
        note: Remarks on the measurement.
        clocks: What `clocks` found before and after the measurement; set by the script.
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
    clocks: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Time of the baseline divided by the time of rocr."""
        return self.times[self.baseline].median / self.times[self.ours].median

    def as_json(self) -> dict[str, Any]:
        """Return the fields and the ratio as JSON values."""
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
    """Time every function once in each round, so that changes of the clock rates affect all of them.

    Args:
        functions: Functions by name. Each is called with the number of the round, so that it can use another buffer
            than in the last round: one that is in the L2 cache would be too fast.
        device: Device that the functions run on.
        rounds: Number of rounds.
        few: Names of functions that are timed in the first two rounds only.
        warm_up: Whether every function is called once before the first round.
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
    """Record a function in a CUDA graph and return its replay function; on other devices return the function."""
    if device.type != "cuda":
        return function
    function()
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        function()
    return recorded.replay


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return ‖result - exact‖ / ‖exact‖."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def machine(device: torch.device) -> dict[str, Any]:
    """Return chip, memory and versions."""
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


CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")
"""What nvidia-smi is asked for: MHz, MHz, watts, °C, and a bit mask of the reasons for which clocks are lowered."""


def clocks(device: torch.device) -> dict[str, str]:
    """Return the clock rates of a GPU and what may lower them; empty for the CPU."""
    if device.type != "cuda":
        return {}
    words = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    number = device.index if device.index is not None else torch.cuda.current_device()
    return parse_clocks(_output([*words, f"--id={number}"]))


def parse_clocks(line: str) -> dict[str, str]:
    """Return the values of a line of nvidia-smi by their names in CLOCKS; "unknown" for each if it has others."""
    values = [value.strip() for value in line.split(",")]
    return dict(zip(CLOCKS, values if len(values) == len(CLOCKS) else ["unknown"] * len(CLOCKS), strict=True))


def _output(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
