"""Tables and JSON values of compared methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rocr.evaluation.baselines.methods import MethodResult
from rocr.evaluation.scores import mean

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Headings, and a row for each method."""


def forget_table(results: Sequence[MethodResult], forms: Sequence[str]) -> Table:
    """Return for each method the mean scores of the forget set by form, and of each target's worst form."""
    rows = []
    for method, mine in _by_method(results).items():
        worst = _mean_of(mine, lambda result: result.evaluation.worst_score())
        rows.append((method, *_scores(mine, forms, "forget"), worst))
    return ("method", *forms, "worst form"), rows


def retain_table(results: Sequence[MethodResult], forms: Sequence[str]) -> Table:
    """Return for each method the mean scores of the retain set by form, mean seconds, and highest peak memory."""
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


def robustness_table(results: Sequence[MethodResult]) -> Table:
    """Return for each method what is left of a fact in its worst wording, FADE, and what fine-tuning leaves forgotten.

    FADE is that of the method's own reference, with its standard error over samples.
    """
    rows: list[tuple[str, ...]] = []
    for method, mine in _by_method(results).items():
        own = [result.fade[result.reference] for result in mine if result.reference in result.fade]
        errors = [fade.error for fade in own if fade.error is not None]
        fade = f"{mean(fade.value for fade in own):.2f}" if own else ""
        # The errors of targets are independent, and their mean is that much smaller.
        spread = f" ± {sum(error**2 for error in errors) ** 0.5 / len(errors):.2f}" if errors else ""
        worst = _mean_of(mine, lambda result: result.evaluation.worst_case())
        rows.append((method, worst, fade + spread, _mean_of(mine, lambda result: result.kept, percent=True)))
    return ("method", "worst case", "FADE", "kept"), rows


def results_json(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """Return the results as JSON values; what was not measured is left out."""
    documents = []
    for result in results:
        document: dict[str, Any] = {
            "method": result.method,
            "target": result.target,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "evaluation": result.evaluation.to_json(),
        }
        if result.fade:
            document["reference"] = result.reference
            document["fade"] = {name: asdict(fade) for name, fade in result.fade.items()}
        if result.relearned is not None:
            document["relearned"] = result.relearned.to_json()
            document["kept"] = result.kept
        documents.append(document)
    return documents


def _by_method(results: Iterable[MethodResult]) -> dict[str, list[MethodResult]]:
    found: dict[str, list[MethodResult]] = {}
    for result in results:
        found.setdefault(result.method, []).append(result)
    return found


def _mean_of(
    results: Sequence[MethodResult], value: Callable[[MethodResult], float | None], percent: bool = False
) -> str:
    """Return the mean of a value over the targets that have it as text, or nothing."""
    found = [each for result in results if (each := value(result)) is not None]
    if not found:
        return ""
    return f"{mean(found):.0%}" if percent else f"{mean(found):.3f}"


def _scores(results: Sequence[MethodResult], forms: Sequence[str], split: str) -> list[str]:
    """Return the mean over targets for each form as text, empty if no question was asked in it."""
    cells = []
    for form in forms:
        scores = [result.evaluation.form_score(form, split) for result in results]
        found = [score.score for score in scores if score is not None]
        cells.append(f"{mean(found):.3f}" if found else "")
    return cells
