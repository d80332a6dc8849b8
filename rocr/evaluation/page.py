"""An evaluation as one HTML page that explains itself: without a script, and without anything loaded from elsewhere.

Texts from outside pass `escaped`, so that names and answers are text whatever they hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rocr.evaluation.glossary import (
    SCORE_TEXTS,
    flat_measures,
    form_title,
    measure_text,
)
from rocr.evaluation.page_parts import Html, table
from rocr.evaluation.page_questions import Questions
from rocr.evaluation.page_style import PAGE_STYLE
from rocr.evaluation.plots import against_plot, relearning_plot, score_bars
from rocr.evaluation.report import (
    STUDY_COLUMNS,
    About,
    attack_columns,
    attack_rows,
    gone_cell,
    interval_cell,
    score_notes,
    study_rows,
)
from rocr.evaluation.scores import Evaluation
from rocr.evaluation.verdict import Verdict, judge
from rocr.io.output import new_file
from rocr.io.svg import escaped


def write_html(
    title: str,
    evaluation: Evaluation,
    path: str | os.PathLike[str],
    before: Evaluation | None = None,
    overwrite: bool = False,
    attacks: Mapping[str, Evaluation] | None = None,
    study: Sequence[Mapping[str, Any]] = (),
    about: About | None = None,
) -> None:
    """Write an evaluation as an HTML page.

    Args:
        title: Title of the page.
        evaluation: Evaluation of the edited model, or of a model without an edit.
        path: File to write.
        before: Evaluation before the edit; None if there is no edit.
        overwrite: Whether an existing file is replaced.
        attacks: Evaluations under attack, by the name of the attack.
        study: The attacks with their controls, see `rocr.evaluation.report.study_rows`.
        about: What was evaluated, and how.

    Raises:
        InputError: If the file exists and `overwrite` is false.
        RocrError: If the page cannot be written.
    """
    page = page_html(title, evaluation, before, attacks or {}, study, about or About())
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")


def page_html(
    title: str,
    evaluation: Evaluation,
    before: Evaluation | None,
    attacks: Mapping[str, Evaluation],
    study: Sequence[Mapping[str, Any]],
    about: About,
) -> str:
    """Return the page of `write_html`."""
    verdict = judge(evaluation, before)
    questions = Questions(evaluation, before, verdict, about)
    parts = [
        f"<header><h1>{escaped(title)}</h1>{_head(verdict)}</header>",
        _section("Scores", _scores(evaluation, before, verdict)),
        _section("What each form asks", "".join(questions.form(form) for form in evaluation.forms)),
        _section("Measures", _measures(evaluation, before, verdict)) if evaluation.measures else "",
        *(
            _section(heading, questions.subjects(split))
            for split, heading in (("forget", "By concept"), ("retain", "Kept subjects"))
            if any(item.split == split for item in evaluation.items)
        ),
        *_pictures(verdict, attacks),
        _attacks(evaluation, before, attacks, study),
        _section("Settings", _settings(evaluation, about)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{PAGE_STYLE}</style></head><body><main>{''.join(parts)}</main></body>"
        "</html>\n"
    )


def _head(verdict: Verdict) -> str:
    alarms = "".join(f"<li>{escaped(alarm.sentence)}</li>" for alarm in verdict.alarms)
    return f'<p class="verdict">{escaped(verdict.sentence)}</p><p>{_with_code(verdict.next_step)}</p>' + (
        f'<div class="alarm"><p><strong>Large losses</strong></p><ul>{alarms}</ul></div>' if alarms else ""
    )


def _with_code(sentence: str) -> str:
    """Return a sentence as HTML, with what is between backticks as code."""
    pieces = [escaped(piece) for piece in sentence.split("`")]
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{inner}</section>"


def _scores(evaluation: Evaluation, before: Evaluation | None, verdict: Verdict) -> str:
    rows: list[tuple[str, ...]] = []
    for judgement in verdict.judgements:
        old = "" if judgement.before is None else f"{judgement.before:.3f}"
        name = Html(f"{escaped(form_title(judgement.form))} <code>{escaped(judgement.form)}</code>")
        rows.append(
            (
                judgement.split,
                name,
                old,
                f"{judgement.after:.3f}",
                Html(score_bars(judgement)),
                gone_cell(judgement),
                interval_cell(judgement),
                f"{judgement.chance:.2f}" if judgement.chance else "",
                str(judgement.questions),
                str(judgement.subjects),
            )
        )
    columns = ["set", "form", "before", "after", "0 to 1", "gone", "95%", "chance", "questions", "subjects"]
    if before is None:
        rows = [(*row[:2], *row[3:5], *row[6:]) for row in rows]
        columns = ["set", "form", "score", "0 to 1", "95%", "chance", "questions", "subjects"]
    notes = [_known_sentence(evaluation), *score_notes(evaluation, verdict, before)]
    terms = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in SCORE_TEXTS.items())
    return (
        table("Scores by form", columns, rows)
        + "".join(f"<p>{escaped(note)}</p>" for note in notes)
        + f"<details><summary>What the columns mean</summary><dl>{terms}</dl></details>"
    )


def _known_sentence(evaluation: Evaluation) -> str:
    if evaluation.known is None:
        return f"All {evaluation.probes} probes count."
    return (
        f"The model before the edit knows {evaluation.known} of {evaluation.probes} probes "
        f"(score of at least {evaluation.known_threshold:g}); only these count."
    )


def _measures(evaluation: Evaluation, before: Evaluation | None, verdict: Verdict) -> str:
    old = flat_measures(before.measures) if before is not None else {}
    large = {alarm.name for alarm in verdict.alarms}
    rows: list[tuple[str, ...]] = []
    for name, value in flat_measures(evaluation.measures).items():
        text = measure_text(name)
        wish = {"higher": "Higher is better.", "lower": "Lower is better.", "same": "", None: ""}[text.better]
        shown = f"{old[name]:.4g}" if name in old else ""
        mark = Html('<strong class="mark">large loss</strong>') if name in large else ""
        rows.append((name, shown, f"{value:.4g}", mark, f"{text.meaning} {wish}".strip()))
    columns = ["measure", "before", "after", "", "what it is"]
    if before is None:
        rows = [(row[0], row[2], row[4]) for row in rows]
        columns = ["measure", "value", "what it is"]
    elif not large:
        rows = [(*row[:3], row[4]) for row in rows]
        columns.remove("")
    return table("Measures beside the scores", [column or "change" for column in columns], rows)


def _pictures(verdict: Verdict, attacks: Mapping[str, Evaluation]) -> list[str]:
    found = {
        "Forget set against retain set": against_plot(verdict),
        "Recovery by relearning": relearning_plot(attacks),
    }
    return [_section(title, f"<figure>{svg}</figure>") for title, svg in found.items() if svg is not None]


def _attacks(
    evaluation: Evaluation,
    before: Evaluation | None,
    attacks: Mapping[str, Evaluation],
    study: Sequence[Mapping[str, Any]],
) -> str:
    if study:
        refused = [f"The attack {each['name']} was not made: {each['refused']}" for each in study if each["refused"]]
        sentences = "".join(f"<p>{escaped(sentence)}</p>" for sentence in refused)
        shown = table("Attacks with their controls", STUDY_COLUMNS, study_rows(study))
        return _section("What attacks bring back", shown + sentences)
    if attacks:
        rows = attack_rows(evaluation, before, attacks)
        return _section("The forget set under attack", table("Scores", attack_columns(evaluation), rows))
    return ""


def _settings(evaluation: Evaluation, about: About) -> str:
    facts: dict[str, Any] = {**about.to_json(), **evaluation.settings, "seconds": f"{evaluation.seconds:.1f}"}
    redirects = facts.pop("redirects")
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in facts.items() if value]
    text = table("Settings of the evaluation", ("setting", "value"), rows)
    if redirects:
        text += table("Redirects of the edit", ("concept", "redirect"), list(redirects.items()))
    return text
