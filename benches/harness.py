"""Run the CPU benches, write one JSON file and print a Markdown table: python benches/harness.py."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from fma_peak import measure
from instruction_sets import SETTINGS, environment, here, openblas_kernel
from machine import commit, cpu_name

from rocr import ops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results" / "cpu.json"

BY_SET = ("low_rank_update", "second_moment", "linear")
"""Benches that are repeated with every instruction set of the machine."""

DEFAULT = ("low_rank_update", "second_moment", "solve")
"""The benches of `RESULTS`; the others have files of their own."""


def machine() -> dict[str, Any]:
    """Return processor, versions and commit."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": ops.available_backends("cpu")[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "commit": commit(),
    }


def measure_here(names: list[str], instruction_set: str) -> dict[str, Any]:
    """Run benches in this process, whose environment is that of the instruction set.

    Returns:
        The instruction set with its peak and the settings of the libraries, and the rows of the benches. The peak is
        measured before and after them, since the clock of a chip changes with its load; the higher one counts.
    """
    peaks = [measure(instruction_set, torch.get_num_threads())]
    rows = run_benches(names)
    peaks.append(measure(instruction_set, torch.get_num_threads()))
    peak = max((each for each in peaks if each is not None), default=None)
    for each in rows:
        each["instruction_set"] = instruction_set
        if peak and "gflops" in each:
            each["share_of_peak"] = each["gflops"] / peak
    about = {
        "name": instruction_set,
        "peak_gflops": peak,
        "openblas_kernel": openblas_kernel(),
        "environment": {key: os.environ[key] for key in SETTINGS.get(instruction_set, {}) if key in os.environ},
    }
    return {"instruction_sets": [about], "benches": rows}


def measure_in_child(names: list[str], instruction_set: str) -> dict[str, Any]:
    """Run benches in a process whose libraries are held to an instruction set: they choose when they are loaded."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        words = [sys.executable, __file__, *names, "--instruction-set", instruction_set, "--out", str(out)]
        if subprocess.run(words, env=environment(instruction_set), check=False).returncode != 0:
            sys.exit(f"The benches with {instruction_set} failed; no file was written.")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def run_benches(names: list[str]) -> list[dict[str, Any]]:
    """Run bench files under pytest-benchmark and return a row for each bench."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        options = ["--benchmark-enable", "--benchmark-quiet", f"--benchmark-json={raw}", "-q"]
        patterns = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
        paths = [str(ROOT / "benches" / f"bench_{name}.py") for name in names]
        status = pytest.main([*options, *patterns, "--import-mode=prepend", f"--rootdir={ROOT}", *paths])
        if status != pytest.ExitCode.OK:
            sys.exit(f"The benches failed (pytest status {int(status)}); no file was written.")
        # There is no file if all benches were skipped, because the machine has nothing that they measure.
        return [row(bench) for bench in json.loads(raw.read_text())["benchmarks"]] if raw.exists() else []


def row(bench: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one bench: median and percentiles of rocr's seconds, and those of the baselines."""
    data = sorted(bench["stats"]["data"])
    fifths = statistics.quantiles(data, n=5, method="inclusive") if len(data) > 1 else data * 4
    spread = {"median": statistics.median(data), "p20": fifths[0], "p80": fifths[-1], "rounds": len(data)}
    return bench["extra_info"] | spread


def table(results: dict[str, Any]) -> str:
    """Return the rows as a Markdown table, with one line for each baseline."""
    about = results["machine"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, NumPy {about['numpy']}, "
        f"Python {about['python']}, commit {about['commit']}. Medians; in brackets the 20th to 80th percentile.",
        "",
        *(_describe(each) for each in results["instruction_sets"]),
        "",
        "| instruction set | operation | size | rocr, ms | share of peak | against | ms | times faster |",
        "|---|---|---|---:|---:|---|---:|---:|",
    ]
    for each in results["benches"]:
        own = f"{each['median'] * 1e3:.1f} ({each['p20'] * 1e3:.1f} to {each['p80'] * 1e3:.1f})"
        share = f"{each['share_of_peak']:.0%}" if "share_of_peak" in each else ""
        for name, baseline in each["baselines"].items():
            lines.append(
                f"| {each['instruction_set']} | {each['operation']} | {each['size']} | {own} | {share} | `{name}` "
                f"| {baseline['median'] * 1e3:.1f} | {baseline['ratio']:.2f} |"
            )
    return "\n".join(lines)


def _describe(about: dict[str, Any]) -> str:
    peak = f"peak {about['peak_gflops']:.0f} GFLOP/s, " if about["peak_gflops"] else ""
    settings = " ".join(f"{key}={value}" for key, value in about["environment"].items()) or "nothing set"
    return f"- {about['name']}: {peak}OpenBLAS {about['openblas_kernel']}, {settings}."


def measure_all(names: list[str]) -> dict[str, Any]:
    """Run benches in a process for each instruction set, those that do not depend on it with the best one only."""
    merged: dict[str, Any] = {"machine": machine(), "instruction_sets": [], "benches": []}
    for i, instruction_set in enumerate(here("cpp" in ops.available_backends("cpu"))):
        wanted = [name for name in names if i == 0 or name in BY_SET]
        if wanted:
            found = measure_in_child(wanted, instruction_set)
            merged["instruction_sets"] += found["instruction_sets"]
            merged["benches"] += found["benches"]
    return merged


def main() -> None:
    """Run the named benches, or those of `DEFAULT`."""
    known = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benches").glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: {' '.join(DEFAULT)})"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write (default: %(default)s)")
    parser.add_argument("--instruction-set", help=argparse.SUPPRESS)  # of a child process
    arguments = parser.parse_args()
    names = arguments.names or list(DEFAULT)
    unknown = set(names) - set(known)
    if unknown:
        parser.error(f"unknown benches: {', '.join(sorted(unknown))}; the benches are {', '.join(known)}")
    in_child = arguments.instruction_set is not None
    results = measure_here(names, arguments.instruction_set) if in_child else measure_all(names)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    if not in_child:
        print(table(results))


if __name__ == "__main__":
    main()
