"""The table of a comparison: each method's mean scores over targets, as in Table I of arXiv 2506.07795."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rocr.evaluation.methods import Result
from rocr.evaluation.scores import mean


def table_columns(forms: Sequence[str]) -> tuple[str, ...]:
    """Headings: a score for each split and form, the worst form of each target, seconds and peak memory."""
    forget, retain = ([f"{split} {form}" for form in forms] for split in ("forget", "retain"))
    return ("method", *forget, "forget worst", *retain, "seconds", "peak GB")


def table_rows(results: Sequence[Result], forms: Sequence[str]) -> list[tuple[str, ...]]:
    """A row for each method: means over targets, of the peak memory the largest."""
    rows: list[tuple[str, ...]] = []
    for method in dict.fromkeys(result.method for result in results):
        mine = [result for result in results if result.method == method]
        cells = [method]
        for split in ("forget", "retain"):
            for form in forms:
                scores = [result.evaluation.form_score(form, split) for result in mine]
                found = [score.score for score in scores if score is not None]
                cells.append(f"{mean(found):.3f}" if found else "")
            if split == "forget":
                worst = [score for result in mine if (score := result.evaluation.worst_score()) is not None]
                cells.append(f"{mean(worst):.3f}" if worst else "")
        cells.append(f"{mean(result.seconds for result in mine):.1f}")
        cells.append(f"{max(result.peak_bytes for result in mine) / 1e9:.2f}")
        rows.append(tuple(cells))
    return rows


def results_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every result as JSON values."""
    return [
        {
            "method": result.method,
            "target": result.target,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "evaluation": result.evaluation.to_json(),
        }
        for result in results
    ]
