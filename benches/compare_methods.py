"""Compare unlearning methods on a real model and print a table like Table I of arXiv 2506.07795.

    make compare
    make compare MODEL=folder
    python benches/compare_methods.py MODEL --redirect "Frédéric Chopin" --targets "Isaac Newton" "Marie Curie" \
        --statistics statistics.safetensors --known 0.5 --out comparison.json

It is `rocr compare` with Markdown tables on stdout, for docs/evaluation.md, with the machine and versions below them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import commit, cpu_name

import rocr
from rocr.cli.main import main as run_command


def main() -> int:
    """Run `rocr compare` with the arguments of this script, and print the table."""
    code = run_command(["compare", *sys.argv[1:]])
    if code == 0 and "--out" in sys.argv:
        document = json.loads(Path(sys.argv[sys.argv.index("--out") + 1]).read_text(encoding="utf-8"))
        print(markdown(document["results"]))
        if any("fade" in result for result in document["results"]):
            print("\n" + by_samples(document["results"]))
        versions = f"rocr {rocr.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"\n{versions}, {cpu_name()}, {torch.get_num_threads()} threads, commit {commit()}")
    return code


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each method; scores and seconds are means over targets."""
    splits = [(s, f) for s, forms in results[0]["evaluation"]["forms"].items() for f in forms]
    measured = [name for name in ("fade", "kept") if any(name in result for result in results)]
    headings = ["method", *(f"{s} {f}" for s, f in splits), "forget worst form", "worst case"]
    headings += [{"fade": "FADE", "kept": "kept"}[name] for name in measured] + ["seconds", "peak GB"]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for method in dict.fromkeys(result["method"] for result in results):
        mine = [result for result in results if result["method"] == method]
        cells = [mean(r["evaluation"]["forms"][s][f]["score"] for r in mine) for s, f in splits]
        cells += [mean(r["evaluation"][name] for r in mine) for name in ("worst_score", "worst_case")]
        cells += [mean(_measure(result, name) for result in mine) for name in measured]
        percent = len(cells) - 1 if "kept" in measured else None
        shown = [_cell(cell, i == percent) for i, cell in enumerate(cells)]
        shown += [f"{mean(r['seconds'] for r in mine):.1f}", f"{max(r['peak_bytes'] for r in mine) / 1e9:.2f}"]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def by_samples(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of FADE by the number of samples, of each method's own reference, and by reference."""
    first = next(result for result in results if "fade" in result)
    counts = list(first["fade"][first["reference"]]["by_samples"])
    names = [name for name in first["fade"] if name != first["target"]]
    headings = ["method", *(f"{count} samples" for count in counts), "error", *names, "itself"]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for method in dict.fromkeys(result["method"] for result in results if "fade" in result):
        mine = [result for result in results if result["method"] == method]
        own = [result["fade"][result["reference"]] for result in mine]
        cells = [mean(fade["by_samples"][count] for fade in own) for count in counts]
        cells.append(sum((fade["error"] or 0.0) ** 2 for fade in own) ** 0.5 / len(own))
        cells += [mean(result["fade"][name]["value"] for result in mine) for name in names]
        cells.append(mean(result["fade"][result["target"]]["value"] for result in mine))
        lines.append(f"| {method} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there; None without any."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _measure(result: dict[str, Any], name: str) -> float | None:
    if name == "fade":
        return result["fade"][result["reference"]]["value"] if "fade" in result else None
    return result.get(name)


def _cell(value: float | None, percent: bool) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if percent else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
