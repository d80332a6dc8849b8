"""Run the CPU benches, write one JSON file and print a Markdown table: python benches/harness.py."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from machine import commit, cpu_name

from rocr import ops
from rocr.ops.cpp_backend import SIMD_VARIABLE, simd_names

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results" / "cpu.json"


def machine() -> dict[str, Any]:
    """Return processor, instruction set, versions and commit."""
    backends = ops.available_backends("cpu")
    simd = os.environ.get(SIMD_VARIABLE) or (simd_names()[0] if "cpp" in backends else "none")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": simd,
        "backend": backends[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "commit": commit(),
    }


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
        return [row(bench) for bench in json.loads(raw.read_text())["benchmarks"]]


def row(bench: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one bench: median and percentiles of rocr's seconds, and those of the baselines."""
    data = sorted(bench["stats"]["data"])
    fifths = statistics.quantiles(data, n=5, method="inclusive") if len(data) > 1 else data * 4
    spread = {"median": statistics.median(data), "p20": fifths[0], "p80": fifths[-1], "rounds": len(data)}
    return bench["extra_info"] | spread


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the rows as a Markdown table, with one line for each baseline."""
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['instruction_set']}, torch {about['torch']}, "
        f"NumPy {about['numpy']}, Python {about['python']}, commit {about['commit']}. Medians; in brackets the "
        "20th to 80th percentile.",
        "",
        "| operation | size | rocr, ms | against | ms | times faster |",
        "|---|---|---:|---|---:|---:|",
    ]
    for each in rows:
        own = f"{each['median'] * 1e3:.1f} ({each['p20'] * 1e3:.1f} to {each['p80'] * 1e3:.1f})"
        for name, baseline in each["baselines"].items():
            lines.append(
                f"| {each['operation']} | {each['size']} | {own} | `{name}` | {baseline['median'] * 1e3:.1f} "
                f"| {baseline['ratio']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the named benches, or all."""
    known = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benches").glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"unknown benches: {', '.join(sorted(unknown))}; the benches are {', '.join(known)}")
    about = machine()
    rows = run_benches(arguments.names or known)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": about, "benches": rows}, indent=2, ensure_ascii=False) + "\n")
    print(table(rows, about))


if __name__ == "__main__":
    main()
