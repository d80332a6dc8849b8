"""Report an evaluation as tables and as JSON; `rocr.evaluation.page` has the page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rocr.evaluation.glossary import SCORE_TEXTS, flat_measures, form_title
from rocr.evaluation.scores import CHOICE_FORMS, Evaluation, compare_evaluations, relative_fall
from rocr.evaluation.verdict import Judgement, Verdict, judge
from rocr.io.json_values import json_text
from rocr.io.output import new_file

STUDY_COLUMNS = ("attack", "form", "before", "after", "attacked", "unedited", "never known", "comes back")
COLUMNS = ("split", "form", "before", "after", "gone", "95%", "chance", "questions", "targets")
NOT_KNOWN = "not known"


@dataclass(frozen=True)
class About:
    """What was evaluated, and how. Names of files are without their folders, which say where somebody works.

    Attributes:
        model: Name of the model.
        edit: Name of the edit file; empty without one.
        date: Day and time of the evaluation, UTC.
        versions: Versions of the packages that scores depend on.
        options: Options of the evaluation that its settings do not have.
        redirects: Redirect of each concept of the edit.
    """

    model: str = ""
    edit: str = ""
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    redirects: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def report_json(
    evaluation: Evaluation,
    before: Evaluation | None = None,
    attacks: Mapping[str, Evaluation] | None = None,
    study: Sequence[Mapping[str, Any]] = (),
    about: About | None = None,
) -> dict[str, Any]:
    """Return an evaluation, its comparison with the one before the edit, and its attacks as JSON values."""
    document: dict[str, Any] = {"format": "rocr evaluation 1", "evaluation": evaluation.to_json()}
    document["verdict"] = judge(evaluation, before).to_json()
    document["about"] = (about or About()).to_json()
    document["questions"] = [
        {"probe": item.probe, "form": item.form, "question": item.question, "answer": item.answer}
        for item in evaluation.items
    ]
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
    verdict = judge(evaluation, before)
    rows: list[tuple[str, ...]] = []
    for split in ("forget", "retain"):
        for form in evaluation.forms:
            score, judgement = evaluation.form_score(form, split), verdict.of(form, split)
            if score is None or judgement is None:
                continue
            rows.append(
                (
                    split,
                    form + (" (derived)" if score.derived and form not in CHOICE_FORMS else ""),
                    f"{judgement.before:.3f}" if judgement.before is not None else "",
                    f"{score.score:.3f}",
                    gone_cell(judgement),
                    interval_cell(judgement),
                    f"{score.chance:.2f}" if score.chance is not None else "",
                    str(score.items),
                    str(score.targets),
                )
            )
        if split == "forget":
            rows += _worst_row(evaluation, before)
    return rows


def gone_cell(judgement: Judgement) -> str:
    """Return the share that is gone, or that nothing was known; empty without an edit."""
    if judgement.gone is None:
        return ""
    return f"{100 * judgement.gone:.1f}%" if judgement.known else NOT_KNOWN


def interval_cell(judgement: Judgement) -> str:
    """Return the ends of the interval, such as "71 to 92%"; empty if there is none."""
    found = judgement.interval
    if found is None:
        return ""
    if judgement.gone is None:
        return f"{found.low:.2f} to {found.high:.2f}"
    return f"{100 * found.low:.0f} to {100 * found.high:.0f}%"


def score_notes(evaluation: Evaluation, verdict: Verdict, before: Evaluation | None) -> list[str]:
    """Return sentences about what the table of scores does not show by itself."""
    notes = []
    silent = [j for j in verdict.judgements if not j.known]
    if silent and before is not None:
        listed = ", ".join(f"{form_title(j.form)} ({j.split} set, {j.before or 0.0:.2f} before)" for j in silent)
        notes.append(f"{NOT_KNOWN.capitalize()}: {SCORE_TEXTS[NOT_KNOWN]} Here: {listed}.")
    worst = evaluation.worst_score()
    if worst is not None:
        old = before.worst_score() if before is not None else None
        was = f" ({old:.3f} before)" if old is not None else ""
        notes.append(
            f"In the form that remembers most of each subject of the forget set, the score is {worst:.3f}{was}."
        )
    return notes


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
    cells = (shown, f"{score:.3f}", gone, "", "", str(count), str(len(targets)))
    return [("forget", "worst form of each target", *cells)]


def measure_rows(evaluation: Evaluation, before: Evaluation | None = None) -> list[tuple[str, str, str]]:
    """Return the name and the values before and after of each further measure."""
    old = flat_measures(before.measures) if before is not None else {}
    return [
        (name, f"{old[name]:.4g}" if name in old else "", f"{value:.4g}")
        for name, value in flat_measures(evaluation.measures).items()
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
