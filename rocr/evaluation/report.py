"""Report an evaluation as tables, as JSON, and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rocr.evaluation.scores import CHOICE_FORMS, Evaluation, compare_evaluations, relative_fall
from rocr.io.json_values import json_text
from rocr.io.output import new_file
from rocr.io.visible import visible

STUDY_COLUMNS = ("attack", "form", "before", "after", "attacked", "unedited", "never known", "comes back")
COLUMNS = ("split", "form", "before", "after", "gone", "chance", "questions", "targets")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
"""


def report_json(
    evaluation: Evaluation,
    before: Evaluation | None = None,
    attacks: Mapping[str, Evaluation] | None = None,
    study: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return an evaluation, its comparison with the one before the edit, and its attacks as JSON values."""
    document: dict[str, Any] = {"format": "rocr evaluation 1", "evaluation": evaluation.to_json()}
    if before is not None:
        document["before"] = before.to_json()
        document["comparison"] = compare_evaluations(before, evaluation).to_json()
    if attacks:
        document["attacks"] = {name: attacked.to_json() for name, attacked in attacks.items()}
    if study:
        document["study"] = list(study)
    return document


def write_json(document: dict[str, Any], path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a report as a JSON file; if writing fails, no file is left.

    Raises:
        InputError: If the file exists and `overwrite` is false.
        RocrError: If it cannot be written.
    """
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_text(json_text(document, indent=1) + "\n", encoding="utf-8")


def table_rows(evaluation: Evaluation, before: Evaluation | None = None) -> list[tuple[str, ...]]:
    """Return a row for each split and form, with the cells of COLUMNS; without `before` some are empty."""
    comparison = compare_evaluations(before, evaluation) if before is not None else None
    rows: list[tuple[str, ...]] = []
    for split in ("forget", "retain"):
        for form in evaluation.forms:
            score = evaluation.form_score(form, split)
            if score is None:
                continue
            change = comparison.change(form, split) if comparison is not None else None
            rows.append(
                (
                    split,
                    form + (" (derived)" if score.derived and form not in CHOICE_FORMS else ""),
                    f"{change.before:.3f}" if change else "",
                    f"{score.score:.3f}",
                    f"{100 * change.fall:.1f}%" if change else "",
                    f"{score.chance:.2f}" if score.chance is not None else "",
                    str(score.items),
                    str(score.targets),
                )
            )
        if split == "forget":
            rows += _worst_row(evaluation, before)
    return rows


def score_table(
    evaluation: Evaluation, before: Evaluation | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows of `table_rows`, without empty columns."""
    return _without_empty(COLUMNS, table_rows(evaluation, before), before is None)


def measure_table(
    evaluation: Evaluation, before: Evaluation | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows of `measure_rows`, without empty columns."""
    return _without_empty(("measure", "before", "after"), measure_rows(evaluation, before), before is None)


def _without_empty(
    columns: Sequence[str], rows: Sequence[tuple[str, ...]], alone: bool
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows without empty columns; `alone` renames the column "after" to "score"."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    names = tuple("score" if alone and columns[i] == "after" else columns[i] for i in kept)
    return names, [tuple(row[i] for i in kept) for row in rows]


def _worst_row(evaluation: Evaluation, before: Evaluation | None) -> list[tuple[str, ...]]:
    """Return the row of `Evaluation.worst_score`; the worst form of a target can differ before and after the edit."""
    score = evaluation.worst_score()
    old = before.worst_score() if before is not None else None
    if score is None:
        return []
    gone = f"{100 * relative_fall(old, score):.1f}%" if old is not None else ""
    shown = f"{old:.3f}" if old is not None else ""
    targets = evaluation.worst()
    count = sum(item.split == "forget" and item.subject in targets for item in evaluation.items)
    return [("forget", "worst form of each target", shown, f"{score:.3f}", gone, "", str(count), str(len(targets)))]


def measure_rows(evaluation: Evaluation, before: Evaluation | None = None) -> list[tuple[str, str, str]]:
    """Return the name and the values before and after of each further measure."""
    old = _flat(before.measures) if before is not None else {}
    return [
        (name, f"{old[name]:.4g}" if name in old else "", f"{value:.4g}")
        for name, value in _flat(evaluation.measures).items()
    ]


def attack_columns(evaluation: Evaluation) -> tuple[str, ...]:
    """Return the headings of `attack_rows`."""
    return ("model", *evaluation.forms, "worst form of each target", "questions")


def attack_rows(
    evaluation: Evaluation, before: Evaluation | None, attacks: Mapping[str, Evaluation]
) -> list[tuple[str, ...]]:
    """Return rows with the scores of the forget set before the edit, after it, and under each attack."""
    models = (
        {"before the edit": before, "after the edit": evaluation} if before is not None else {"no attack": evaluation}
    )
    rows = []
    for name, scores in {**models, **attacks}.items():
        if scores is not None:
            found = [scores.form_score(form, "forget") for form in evaluation.forms]
            worst = scores.worst_score()
            cells = [f"{score.score:.3f}" if score is not None else "" for score in found]
            asked = {item.probe for item in scores.items if item.split == "forget"}
            rows.append((name, *cells, f"{worst:.3f}" if worst is not None else "", str(len(asked))))
    return rows


def study_rows(study: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for each outcome and form of attacks, with the cells of STUDY_COLUMNS.

    Args:
        study: The JSON values of `rocr.evaluation.attacks.study.Studied`.
    """
    rows = []
    for outcome in (outcome for attack in study for outcome in attack["outcomes"]):
        name = ", ".join(filter(None, (outcome["attack"], outcome["setting"])))
        for form in outcome["attacked"]:
            numbers = [outcome[when][form] for when in ("before", "after", "attacked")]
            numbers += [(outcome[control] or {}).get(form) for control in ("unedited", "never")]
            share = outcome["returned"][form]
            cells = ["" if number is None else f"{number:.3f}" for number in numbers]
            rows.append((name, form, *cells, "" if share is None else f"{100 * share:.0f}%"))
    return rows


def write_html(
    title: str,
    evaluation: Evaluation,
    path: str | os.PathLike[str],
    before: Evaluation | None = None,
    overwrite: bool = False,
    attacks: Mapping[str, Evaluation] | None = None,
    study: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write an HTML page with embedded tables and plots, which loads nothing from elsewhere.

    Args:
        title: Title of the page.
        evaluation: Evaluation of the edited model, or of a model without an edit.
        path: File to write.
        before: Evaluation before the edit; None if there is no edit.
        overwrite: Whether an existing file is replaced.
        attacks: Evaluations under attack, by the name of the attack.
        study: The attacks with their controls, see `study_rows`.

    Raises:
        InputError: If the file exists and `overwrite` is false, or matplotlib is not installed.
        RocrError: If the page cannot be written.
    """
    from rocr.evaluation.plots import draw_plots

    pictures = draw_plots(evaluation, before, attacks or {})
    parts = [f"<h1>{_escaped(title)}</h1>", _filter_sentence(evaluation)]
    parts.append(_table(*score_table(evaluation, before)))
    if evaluation.measures:
        parts.append(_table(*measure_table(evaluation, before)))
    if attacks and not study:
        parts.append("<h2>The forget set under attack</h2>")
        parts.append(_table(attack_columns(evaluation), attack_rows(evaluation, before, attacks)))
    if study:
        parts.append("<h2>What attacks bring back</h2>")
        parts.append(_table(STUDY_COLUMNS, study_rows(study)))
    for caption, png in pictures:
        data = base64.b64encode(png).decode()
        text = _escaped(caption)
        parts.append(f'<h2>{text}</h2><img alt="{text}" src="data:image/png;base64,{data}">')
    worst = [(subject, form, f"{score:.3f}") for subject, (form, score) in evaluation.worst().items()]
    if worst:
        parts.append("<h2>The form with the highest score, by target</h2>")
        parts.append(_table(("target", "form", "score"), worst))
    parts.append(f"<p>Settings: {_escaped(json.dumps(evaluation.settings))}</p>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_escaped(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")


def _filter_sentence(evaluation: Evaluation) -> str:
    """Return a paragraph that says which probes count."""
    if evaluation.known is None:
        return f"<p>All {evaluation.probes} probes count.</p>"
    return (
        f"<p>The model before the edit knows {evaluation.known} of {evaluation.probes} probes "
        f"(score of at least {evaluation.known_threshold:g}); only these count.</p>"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [bool(rows) and all(_is_number(row[i]) or not row[i] for row in rows) for i in range(len(columns))]
    head = "".join(
        f"<th{' class=number' if number else ''}>{_escaped(column)}</th>"
        for column, number in zip(columns, numeric, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _escaped(text: str) -> str:
    """Return text as HTML, with invisible and control characters written as their code points."""
    return html.escape(visible(text))


def _cell(text: str) -> str:
    return f"<td{' class=number' if _is_number(text) else ''}>{_escaped(text)}</td>"


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace("%", "").replace("-", "").replace("e", "").isdigit()


def _flat(measures: dict[str, Any]) -> dict[str, float]:
    """Return measures with those of nested ones named "outer inner"."""
    flat: dict[str, float] = {}
    for name, value in measures.items():
        if isinstance(value, dict):
            flat.update({f"{name} {inner}": number for inner, number in value.items()})
        else:
            flat[name] = value
    return flat
