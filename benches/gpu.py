"""Check and time rocr on an NVIDIA GPU against the fastest torch expressions, and write one JSON file.

    python benches/gpu.py [ROW ...] [--out FILE] [--limit SECONDS]

Without names, all rows are measured. A row that would start after the limit is recorded as failed. --tiny uses small
shapes, on a GPU or the CPU, to test the script: its times have no meaning, and no file is written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import grouped_second_moment, low_rank_update, second_moment, second_moments, small_second_moment
from gpu_solve import solve
from gpu_timing import ROOT, Row, clocks, machine

Bench = Callable[[torch.device], list[Row]]


def statistics(device: torch.device, **sizes: Any) -> list[Row]:
    """Run the bench of gpu_pipeline, which takes seconds to import."""
    from gpu_pipeline import statistics

    return statistics(device, **sizes)


def thousand_concepts(device: torch.device, **sizes: Any) -> list[Row]:
    """Run the bench of gpu_pipeline, which takes seconds to import."""
    from gpu_pipeline import thousand_concepts

    return thousand_concepts(device, **sizes)


ROUNDS = 30
"""Rounds of the rows of kernels: eight spread from 38.6 to 45.4 ms where the median was 41.9."""

LIMIT = 420.0
"""Seconds after which no row starts; `make gpu` is to take less than 8 minutes."""

ROWS: dict[str, Bench] = {
    "second-moment": lambda device: second_moment(device, 131072, 14336, ROUNDS),
    "second-moments": lambda device: second_moments(device, 131072, 1536, layers=5, rounds=ROUNDS),
    "second-moment-small": lambda device: small_second_moment(device, 8192, 1536, rounds=50),
    "experts": lambda device: grouped_second_moment(device, 131072, 128, 8, 768, ROUNDS),
    "update-1": lambda device: low_rank_update(device, 32, (4096, 14336), 1, ROUNDS, (1.0, 1.3)),
    "update-16": lambda device: low_rank_update(device, 32, (4096, 14336), 16, ROUNDS, (1.0, 1.3)),
    "update-128": lambda device: low_rank_update(device, 32, (4096, 14336), 128, ROUNDS, (1.0, 1.3)),
    "update-small": lambda device: low_rank_update(device, 30, (576, 1536), 16, 100, (4, 8), sets=8),
    "solve-1": lambda device: solve(device, 14336, 4096, 1, rounds=5),
    "solve-1000": lambda device: solve(device, 14336, 4096, 1000, rounds=5),
    "statistics": lambda device: statistics(device, tokens=600_000, official_tokens=8192),
    "thousand-concepts": lambda device: thousand_concepts(device, count=1000, official_count=3),
}
TINY_ROWS: dict[str, Bench] = {
    "second-moment": lambda device: second_moment(device, 300, 136, rounds=2),
    "second-moments": lambda device: second_moments(device, 300, 72, layers=2, rounds=2),
    "second-moment-small": lambda device: small_second_moment(device, 100, 72, rounds=2),
    "experts": lambda device: grouped_second_moment(device, 300, 5, 2, 72, rounds=2),
    "update-1": lambda device: low_rank_update(device, 2, (64, 136), 1, 2, (1.0, 1.3), sets=2),
    "update-16": lambda device: low_rank_update(device, 2, (64, 136), 16, 2, (1.0, 1.3), sets=2),
    "update-128": lambda device: low_rank_update(device, 2, (64, 136), 128, 2, (1.0, 1.3), sets=2),
    "update-small": lambda device: low_rank_update(device, 3, (24, 40), 4, 2, (4, 8), sets=2),
    "solve-1": lambda device: solve(device, 96, 32, 1, rounds=2),
    "solve-1000": lambda device: solve(device, 96, 32, 7, rounds=2),
    "statistics": lambda device: statistics(device, tokens=600, official_tokens=100, tiny=True),
    "thousand-concepts": lambda device: thousand_concepts(device, count=4, official_count=1, tiny=True),
}


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| work | size | rocr | ms | against | ms | times faster | at least | aim | error | its error |"]
    lines.append("|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        ours, other = row.times[row.ours], row.times[row.baseline]
        errors = [f"{row.error[name]:.1e}" if name in row.error else "" for name in (row.ours, row.baseline)]
        lines.append(
            f"| {row.work} | {row.size} | {row.ours} | {ours.median * 1e3:.3f} ({ours.p20 * 1e3:.3f} to "
            f"{ours.p80 * 1e3:.3f}) | {row.baseline} | {other.median * 1e3:.3f} ({other.p20 * 1e3:.3f} to "
            f"{other.p80 * 1e3:.3f}) | {row.ratio:.2f} | {row.at_least:g} | "
            f"{row.aim:g} | {errors[0]} | {errors[1]} |"
        )
    return "\n".join(lines)


def results_file(chip: str) -> Path:
    """Return the path of the results of a chip."""
    return ROOT / "benches" / "results" / f"{re.sub('[^a-z0-9]+', '-', chip.lower()).strip('-')}.json"


def run(
    benches: dict[str, Bench],
    device: torch.device,
    keep: Callable[[list[Row], dict[str, str]], None],
    limit: float = LIMIT,
) -> tuple[list[Row], dict[str, str]]:
    """Run benches and return their rows, and the error message of each bench that fails.

    Args:
        benches: Benches by name.
        device: Device to run on.
        keep: Function that is called after each bench with all rows and errors so far, so that an interrupted run
            loses one bench only.
        limit: Seconds after which no bench starts.
    """
    begin = time.perf_counter()
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name, bench in benches.items():
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            if start - begin > limit:
                raise TimeoutError(f"not measured, since {limit:g} s had passed before it; name it to measure it alone")
            before = clocks(device)
            found = bench(device)
            for row in found:
                row.clocks = {"before": before, "after": clocks(device)}
            rows += found
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        if device.type == "cuda":
            torch.cuda.empty_cache()
        said = failed.get(name, "done")
        keep(rows, failed)
        print(f"{name}: {said.splitlines()[0]} ({time.perf_counter() - start:.1f} s)", file=sys.stderr, flush=True)
    return rows, failed


def main() -> int:
    """Run the named rows, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: benches/results/<chip>.json)")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="SECONDS",
        help=f"start no row after this time (default: {LIMIT:g})",
    )
    parser.add_argument("--tiny", action="store_true", help="use small shapes, to test the script")
    arguments = parser.parse_args()
    known = TINY_ROWS if arguments.tiny else ROWS
    if unknown := set(arguments.rows) - set(known):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; the rows are {', '.join(known)}")
    if not torch.cuda.is_available() and not arguments.tiny:
        print(
            "benches/gpu.py needs an NVIDIA GPU, and torch sees none here; --tiny tests the script on the CPU.",
            file=sys.stderr,
        )
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = machine(device)
    path = arguments.out or results_file(about["chip"])

    def keep(rows: list[Row], failed: dict[str, str]) -> None:
        if not arguments.tiny:
            path.parent.mkdir(parents=True, exist_ok=True)
            results = {"machine": about, "rows": [row.as_json() for row in rows], "failed": failed}
            path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")

    chosen = {name: bench for name, bench in known.items() if name in (arguments.rows or known)}
    rows, failed = run(chosen, device, keep, arguments.limit)
    print(table(rows))
    if not arguments.tiny:
        print(f"Written to {path}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
