"""Read the rows of search_defaults.py, and format them as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMS = ("qa", "fb", "mcp")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of means over the runs of each candidate; decreases are those of scores above chance."""
    lines = ["| candidate | together | runs | " + " | ".join(f"{form}, gone" for form in FORMS)]
    lines[0] += " | worst open form, gone | " + " | ".join(f"{form}, lost" for form in FORMS) + " | perplexity |"
    lines.append("|---|" + "---:|" * 10)
    for name, together in dict.fromkeys((row["candidate"], row["together"]) for row in rows):
        mine = [row for row in rows if (row["candidate"], row["together"]) == (name, together)]
        forget = {form: relative_decrease([row[f"forget {form}"] for row in mine]) for form in FORMS}
        cells = [*forget.values(), min(forget[form] for form in FORMS if form != "mcp")]
        if together:
            cells += [relative_decrease([row[f"retain {form}"] for row in mine]) for form in FORMS]
            cells.append(sum(row["perplexity"][1] / row["perplexity"][0] for row in mine) / len(mine) - 1)
        shown = [f"{100 * cell:.1f}%" for cell in cells] + [""] * (8 - len(cells))
        lines.append(f"| {name} | {together} | {len(mine)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def relative_decrease(scores: Sequence[Sequence[float | None]]) -> float:
    """Return the relative decrease of the score above chance, from the means over runs of (before, after, chance)."""
    before, after, chance = (sum(score[i] or 0.0 for score in scores) / len(scores) for i in range(3))
    return (before - after) / (before - chance) if before > chance else 0.0
