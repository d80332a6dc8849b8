"""The tables of a comparison: each method's mean scores over targets, as in Table I of arXiv 2506.07795."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rocr.evaluation.baselines.methods import Result
from rocr.evaluation.scores import mean


def forget_table(results: Sequence[Result], forms: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and a row for each method: the forget set's mean score in each form, and in each target's worst."""
    rows = []
    for method, mine in _by_method(results).items():
        worst = [score for result in mine if (score := result.evaluation.worst_score()) is not None]
        rows.append((method, *_scores(mine, forms, "forget"), f"{mean(worst):.3f}" if worst else ""))
    return ("method", *forms, "worst form"), rows


def retain_table(results: Sequence[Result], forms: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and a row for each method: the retain set's mean scores, mean seconds, and the largest peak memory."""
    rows = [
        (
            method,
            *_scores(mine, forms, "retain"),
            f"{mean(result.seconds for result in mine):.1f}",
            f"{max(result.peak_bytes for result in mine) / 1e9:.2f}",
        )
        for method, mine in _by_method(results).items()
    ]
    return ("method", *forms, "seconds", "peak GB"), rows


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.method, []).append(result)
    return found


def _scores(results: Sequence[Result], forms: Sequence[str], split: str) -> list[str]:
    """The mean over targets for each form; empty where no question was asked in it."""
    cells = []
    for form in forms:
        scores = [result.evaluation.form_score(form, split) for result in results]
        found = [score.score for score in scores if score is not None]
        cells.append(f"{mean(found):.3f}" if found else "")
    return cells


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
