"""Draw plots of an evaluation as PNG images. Needs the package matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rocr.errors import InputError
from rocr.evaluation.scores import Evaluation, mean
from rocr.io.boundary import calling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_TARGETS = 40
_SPLITS = ("forget", "retain")
_BEFORE, _AFTER, _ALONE = "#7a8ba8", "#d95f02", "#1b6ca8"
_COLOURS = ("#1b6ca8", "#d95f02", "#3a923a", "#8e4ec6", "#b8860b", "#c0392b", "#17807e", "#555555", "#e377c2")
_LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # readable on top of the line of chance
_WIDTH = 8.0  # inches
_CURVE = re.compile(r"relearn (\d+) epochs")


def draw_plots(
    evaluation: Evaluation, before: Evaluation | None = None, attacks: Mapping[str, Evaluation] | None = None
) -> list[tuple[str, bytes]]:
    """Return captions and PNG images: scores by form, by target, of forget against retain set, and under attacks.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # pyplot keeps global state
    except ImportError:
        raise InputError("Plots need the package matplotlib: pip install 'rocr[report]'.") from None
    # A name can contain dollar signs, which matplotlib would parse as a formula.
    with calling("Drawing plots with matplotlib"), rc_context({"text.parse_math": False}):
        return [(caption, _png(figure)) for caption, figure in _figures(Figure, evaluation, before, attacks or {})]


def _figures(
    figure_class: Any, evaluation: Evaluation, before: Evaluation | None, attacks: Mapping[str, Evaluation]
) -> list[tuple[str, Figure]]:
    splits = [split for split in _SPLITS if any(item.split == split for item in evaluation.items)]
    plots = [("Scores by form", _forms(figure_class, splits, evaluation, before))]
    if "forget" in splits:
        plots.append(_targets(figure_class, evaluation, before))
    if len(splits) == 2:
        plots.append(("Forget set against retain set, by form", _against(figure_class, evaluation, before)))
    plain = {name: scores for name, scores in attacks.items() if not _CURVE.fullmatch(name)}
    curve = {int(match[1]): scores for name, scores in attacks.items() if (match := _CURVE.fullmatch(name))}
    if plain:
        plots.append(("The forget set under attack", _attacks(figure_class, evaluation, before, plain)))
    if curve:
        plots.append(("Recovery by relearning, asked about other facts", _curve(figure_class, curve)))
    return plots


def _forms(figure_class: Any, splits: Sequence[str], evaluation: Evaluation, before: Evaluation | None) -> Figure:
    figure, all_axes = _new(figure_class, 3.6, columns=len(splits))
    for split, axes in zip(splits, all_axes, strict=True):
        forms = [form for form in evaluation.forms if evaluation.select(form, split)]
        for offset, label, colour, scores in _series(evaluation, before):
            values = [score.score if (score := scores.form_score(form, split)) else 0.0 for form in forms]
            bars = axes.bar([i + offset for i in range(len(forms))], values, width=0.38, label=label, color=colour)
            axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=1, fontsize=7, zorder=4, bbox=_LABEL)
        for i, form in enumerate(forms):
            score = evaluation.form_score(form, split)
            if score is not None and score.chance is not None:
                axes.hlines(score.chance, i - 0.45, i + 0.45, colors="black", linestyles="dashed", label="chance")
        axes.set_xticks(range(len(forms)), forms, rotation=30 if len(forms) > 5 else 0)
        axes.set_ylim(0, 1.05)
        axes.set_title(f"{split} set")
    all_axes[0].set_ylabel("score")
    _legend_above(figure, all_axes)
    return figure


def _targets(figure_class: Any, evaluation: Evaluation, before: Evaluation | None) -> tuple[str, Figure]:
    """Draw a line for each target from its score before to its score after, those with the highest scores on top."""
    means = {subject: mean(scores.values()) for subject, scores in evaluation.by_target().items()}
    shown = sorted(means, key=lambda subject: means[subject])[-SHOWN_TARGETS:]
    figure, (axes,) = _new(figure_class, 1.1 + 0.27 * len(shown))
    places = range(len(shown))
    if before is not None:
        old = {subject: mean(scores.values()) for subject, scores in before.by_target().items()}
        axes.hlines(
            places, [means[s] for s in shown], [old[s] for s in shown], colors="#cccccc", linewidths=3, zorder=1
        )
    for _, label, colour, scores in _series(evaluation, before):
        found = {subject: mean(values.values()) for subject, values in scores.by_target().items()}
        axes.scatter([found[s] for s in shown], places, s=42, color=colour, label=label, zorder=2)
    axes.set_yticks(places, shown)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("mean score over forms")
    axes.grid(axis="x", alpha=0.3)
    if before is not None:
        _legend_above(figure, [axes])
    left_out = len(means) - len(shown)
    return f"Scores by target (top {len(shown)} of {len(means)})" if left_out else "Scores by target", figure


def _against(figure_class: Any, evaluation: Evaluation, before: Evaluation | None) -> Figure:
    """Draw an arrow for each form from before to after the edit: to the left for forgetting, down for damage."""
    figure, (axes,) = _new(figure_class, 5.2)
    drawn = (e.form_score(form, split) for e in (before, evaluation) if e for form in e.forms for split in _SPLITS)
    highest = max((score.score for score in drawn if score is not None), default=0) or 1.0
    for colour, form in zip(_COLOURS, evaluation.forms, strict=False):
        forget, retain = evaluation.form_score(form, "forget"), evaluation.form_score(form, "retain")
        if forget is None or retain is None:
            continue
        axes.scatter(forget.score, retain.score, s=70, color=colour, label=form, zorder=3)
        old_forget = before.form_score(form, "forget") if before is not None else None
        old_retain = before.form_score(form, "retain") if before is not None else None
        if old_forget is not None and old_retain is not None:
            start = (old_forget.score, old_retain.score)
            axes.scatter(*start, s=70, facecolors="white", edgecolors=colour, linewidths=1.8, zorder=2)
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.5, "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", (forget.score, retain.score), xytext=start, arrowprops=arrow)
    for limit in (axes.set_xlim, axes.set_ylim):
        limit(-0.02 * highest, 1.1 * highest)  # from 0 to a little above the highest score
    axes.set_xlabel("score of the forget set (lower is better)")
    axes.set_ylabel("score of the retain set (unchanged is better)")
    axes.grid(alpha=0.3)
    _legend_above(figure, [axes], "form (hollow: before)" if before is not None else "form")
    return figure


def _attacks(
    figure_class: Any, evaluation: Evaluation, before: Evaluation | None, attacks: Mapping[str, Evaluation]
) -> Figure:
    names = (
        {"before\nthe edit": before, "after\nthe edit": evaluation} if before is not None else {"no attack": evaluation}
    )
    models = {name: scores for name, scores in {**names, **attacks}.items() if scores is not None}
    forms = evaluation.forms
    figure, (axes,) = _new(figure_class, 3.8)
    width = 0.8 / len(forms)
    for i, (colour, form) in enumerate(zip(_COLOURS, forms, strict=False)):
        values = [score.score if (score := e.form_score(form, "forget")) else 0.0 for e in models.values()]
        places = [place + (i - (len(forms) - 1) / 2) * width for place in range(len(models))]
        bars = axes.bar(places, values, width=width * 0.92, color=colour, label=form)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=1, fontsize=6)
    axes.set_xticks(range(len(models)), list(models))
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("score of the forget set")
    _legend_above(figure, [axes])
    return figure


def _curve(figure_class: Any, curve: Mapping[int, Evaluation]) -> Figure:
    figure, (axes,) = _new(figure_class, 3.8)
    epochs = sorted(curve)
    for colour, form in zip(_COLOURS, curve[epochs[0]].forms, strict=False):
        values = [score.score if (score := curve[n].form_score(form, "forget")) else 0.0 for n in epochs]
        axes.plot(range(len(epochs)), values, "o-", color=colour, label=form)
    axes.set_xticks(range(len(epochs)), [str(count) for count in epochs])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("epochs of training on other facts of the target")
    axes.set_ylabel("score of the forget set")
    axes.grid(alpha=0.3)
    _legend_above(figure, [axes])
    return figure


def _series(evaluation: Evaluation, before: Evaluation | None) -> list[tuple[float, str, str, Evaluation]]:
    """Return offset of the bars, label, colour and scores of each evaluation to draw."""
    if before is None:
        return [(0.0, "score", _ALONE, evaluation)]
    return [(-0.2, "before", _BEFORE, before), (0.2, "after", _AFTER, evaluation)]


def _new(figure_class: Any, height: float, columns: int = 1) -> tuple[Figure, Sequence[Any]]:
    figure = figure_class(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_above(figure: Figure, all_axes: Sequence[Any], title: str | None = None) -> None:
    """Add one legend above all axes with each label once."""
    entries: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(len(entries), 6)
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=columns, frameon=False, title=title
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
