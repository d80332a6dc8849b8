"""Compare unlearning methods on a real model and print a table like Table I of arXiv 2506.07795.

    make compare
    python benches/compare_methods.py MODEL --redirect "Frédéric Chopin" --targets "Isaac Newton" "Marie Curie" \
        --statistics statistics.safetensors --known 0.5 --out comparison.json

It is `rocr compare` with a Markdown table on stdout, for docs/evaluation.md, with the machine and versions below it.
"""

from __future__ import annotations

import json
import sys
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
    if code == 0:
        document = json.loads(Path(sys.argv[sys.argv.index("--out") + 1]).read_text(encoding="utf-8"))
        print(markdown(document["results"]))
        versions = f"rocr {rocr.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"\n{versions}, {cpu_name()}, {torch.get_num_threads()} threads, commit {commit()}")
    return code


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each method; scores and seconds are means over targets."""
    splits = [(s, f) for s, forms in results[0]["evaluation"]["forms"].items() for f in forms]
    lines = ["| method | " + " | ".join(f"{s} {f}" for s, f in splits) + " | forget worst | seconds | peak GB |"]
    lines.append("|---|" + "---:|" * (len(splits) + 3))
    for method in dict.fromkeys(result["method"] for result in results):
        mine = [result for result in results if result["method"] == method]
        cells = [sum(r["evaluation"]["forms"][s][f]["score"] for r in mine) / len(mine) for s, f in splits]
        cells.append(sum(r["evaluation"]["worst_score"] for r in mine) / len(mine))
        seconds = sum(result["seconds"] for result in mine) / len(mine)
        peak = max(result["peak_bytes"] for result in mine) / 1e9
        numbers = " | ".join(f"{cell:.3f}" for cell in cells)
        lines.append(f"| {method} | {numbers} | {seconds:.1f} | {peak:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
