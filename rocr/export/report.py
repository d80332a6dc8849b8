"""The report of an edit as JSON: concepts, settings, measurements and durations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rocr.edit.edit import Edit
from rocr.evaluation.measures import ngram_entropy
from rocr.export.copying import REPORT_FILE
from rocr.io.versions import versions

FORMAT = "rocr report 1"


@dataclass(frozen=True)
class Answer:
    """A question and the answers to it.

    Attributes:
        name: Name of the subject of the question.
        on_list: Whether the subject is one of the concepts.
        question: The question as asked.
        before: Answer of the model before the edit.
        after: Answer of the model after the edit.
    """

    name: str
    on_list: bool
    question: str
    before: str
    after: str


def build_report(
    edit: Edit,
    model: str,
    seconds: Mapping[str, float],
    answers: Sequence[Answer],
    files: Mapping[str, str],
    linked: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the report of an edit as JSON values. The field names are those of rocr 0.1.

    Args:
        edit: The edit.
        model: The model as the user named it.
        seconds: Duration of each stage of the command, in seconds.
        answers: Answers before and after the edit.
        files: sha256 of every file of the output except the report and linked files.
        linked: Files that are hard links to files of the model, which are not read.
    """
    layers = edit.report.layers
    concepts = []
    for i, concept in enumerate(edit.concepts):
        closed = sum(layer.closed[i] for layer in layers) / len(layers) if layers else None
        distance = edit.report.distance[i] if edit.report.distance else None
        concepts.append({**concept.to_json(), "closed": closed, "distance": distance})
    return {
        "format": FORMAT,
        "model": model,
        "fingerprint": edit.fingerprint.to_json(),
        "concepts": concepts,
        "config": edit.config.to_json(),
        "statistics": edit.report.statistics,
        "layers": [asdict(layer) for layer in layers],
        "divergence": edit.report.divergence,
        **({} if edit.report.drift is None else {"drift": edit.report.drift}),
        "limits_passed": edit.report.limits_passed,
        "inexact": edit.report.inexact,
        "collisions": None if edit.report.collisions is None else asdict(edit.report.collisions),
        "neighbours": None if edit.report.retained is None else edit.report.retained.to_json(),
        **({"harmed": [harm.to_json() for harm in edit.report.harmed]} if edit.report.harmed else {}),
        **({"routing": [layer.to_json() for layer in edit.report.routing]} if edit.report.routing else {}),
        "answers": [asdict(answer) for answer in answers],
        **fluency([answer for answer in answers if answer.on_list]),
        "seconds": {"stages": dict(seconds), "edit": edit.report.seconds},
        "versions": versions(),
        "files": dict(files),
        "linked": list(linked),
        "note": "Measurements of one edit. They are not proof that the concepts cannot be recovered.",
    }


def fluency(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Return the mean n-gram entropy, in bits, of the answers about concepts before and after the edit.

    A repetitive answer has a low one. Empty without answers.
    """
    if not answers:
        return {}
    texts = {"before": [answer.before for answer in answers], "after": [answer.after for answer in answers]}
    means = {when: sum(ngram_entropy(text.split()) for text in own) / len(own) for when, own in texts.items()}
    return {"fluency": means}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, with the digest of all other fields in the field `sha256`."""
    report["sha256"] = report_digest(report)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    # A file name that is not UTF-8 is written as JSON escapes of its bytes.
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def report_digest(report: Mapping[str, Any]) -> str:
    """Return the sha256 of a report's fields except `sha256`, whatever order and whitespace its JSON text has."""
    fields = {name: value for name, value in report.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
