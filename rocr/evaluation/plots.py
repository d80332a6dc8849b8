"""Plots of an evaluation as PNG images; needs matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rocr.errors import InputError
from rocr.evaluation.scores import Evaluation, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_TARGETS = 40
_BEFORE, _AFTER = "#8da0cb", "#d95f02"


def draw_plots(evaluation: Evaluation, before: Evaluation | None = None) -> list[tuple[str, bytes]]:
    """Captions and PNG images: scores by form, by target, and of the forget set against the retain set.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        raise InputError("Plots need the package matplotlib: pip install 'rocr[report]'.") from None
    plots = [
        (f"Scores by form: {split} set", _forms(Figure, split, evaluation, before)) for split in _splits(evaluation)
    ]
    plots.append(("Scores by target, mean over forms", _targets(Figure, evaluation, before)))
    if len(_splits(evaluation)) == 2:
        plots.append(("Forget set against retain set, by form", _against(Figure, evaluation, before)))
    return [(caption, _png(figure)) for caption, figure in plots]


def _splits(evaluation: Evaluation) -> list[str]:
    return [split for split in ("forget", "retain") if any(item.split == split for item in evaluation.items)]


def _forms(figure_class: Any, split: str, evaluation: Evaluation, before: Evaluation | None) -> Figure:
    figure, axes = _new(figure_class, 7, 3.5)
    forms = [form for form in evaluation.forms if evaluation.select(form, split)]
    for offset, (label, colour, scores) in _series(evaluation, before):
        values = [score.score if (score := scores.form_score(form, split)) else 0.0 for form in forms]
        axes.bar([i + offset for i in range(len(forms))], values, width=0.38, label=label, color=colour)
    for i, form in enumerate(forms):
        score = evaluation.form_score(form, split)
        if score is not None and score.chance is not None:
            axes.hlines(score.chance, i - 0.45, i + 0.45, colors="black", linestyles="dashed", label="chance")
    axes.set_xticks(range(len(forms)), forms)
    axes.set_ylim(0, 1)
    axes.set_ylabel("score")
    axes.legend()
    return figure


def _targets(figure_class: Any, evaluation: Evaluation, before: Evaluation | None) -> Figure:
    means = {subject: mean(scores.values()) for subject, scores in evaluation.by_target().items()}
    shown = sorted(means, key=lambda subject: means[subject])[-SHOWN_TARGETS:]
    figure, axes = _new(figure_class, 7, 1.2 + 0.28 * len(shown))
    for offset, (label, colour, scores) in _series(evaluation, before):
        found = scores.by_target()
        values = [mean(found[subject].values()) for subject in shown]
        axes.barh([i - offset for i in range(len(shown))], values, height=0.38, label=label, color=colour)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_xlim(0, 1)
    axes.set_xlabel("score")
    axes.legend()
    return figure


def _against(figure_class: Any, evaluation: Evaluation, before: Evaluation | None) -> Figure:
    figure, axes = _new(figure_class, 5, 4.5)
    for _, (label, colour, scores) in _series(evaluation, before):
        for form in scores.forms:
            forget, retain = scores.form_score(form, "forget"), scores.form_score(form, "retain")
            if forget is not None and retain is not None:
                axes.plot(forget.score, retain.score, "o", color=colour)
                axes.annotate(
                    f"{form}, {label}", (forget.score, retain.score), xytext=(4, 4), textcoords="offset points"
                )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("forget set: lower is better")
    axes.set_ylabel("retain set: as before is better")
    return figure


def _series(evaluation: Evaluation, before: Evaluation | None) -> list[tuple[float, tuple[str, str, Evaluation]]]:
    """Offset of the bars, label, colour and scores of what is drawn."""
    if before is None:
        return [(0.0, ("score", _AFTER, evaluation))]
    return [(-0.2, ("before", _BEFORE, before)), (0.2, ("after", _AFTER, evaluation))]


def _new(figure_class: Any, width: float, height: float) -> tuple[Figure, Any]:
    figure = figure_class(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
