"""The report of an edit as JSON: what was done, with which settings, what came of it, how long it took."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rocr.edit.edit import Edit
from rocr.io.versions import versions

FORMAT = "rocr report 1"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Answer:
    """A question and its answers.

    Attributes:
        name: whom or what it is about.
        on_list: whether that is one of the concepts.
        question: as asked.
        before: the model's answer before the edit.
        after: its answer after the edit.
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
    """Everything about an edit that a later reader needs, as JSON values.

    Args:
        edit: the edit.
        model: what the user called the model.
        seconds: duration of each stage of the command.
        answers: before and after.
        files: sha256 of every file of the output but the report and those that are linked.
        linked: files that are the input's own, which were not read.
    """
    layers = edit.report.layers
    concepts = []
    for i, concept in enumerate(edit.concepts):
        closed = sum(layer.closed[i] for layer in layers) / len(layers) if layers else None
        distance = edit.report.distance[i] if edit.report.distance else None
        concepts.append({**asdict(concept), "closed": closed, "distance": distance})
    return {
        "format": FORMAT,
        "model": model,
        "fingerprint": edit.fingerprint.to_json(),
        "concepts": concepts,
        "config": edit.config.to_json(),
        "statistics": edit.report.statistics,
        "layers": [asdict(layer) for layer in layers],
        "divergence": edit.report.divergence,
        "limits_passed": edit.report.limits_passed,
        "inexact": edit.report.inexact,
        "collisions": None if edit.report.collisions is None else asdict(edit.report.collisions),
        "neighbours": None if edit.report.retained is None else edit.report.retained.to_json(),
        "answers": [asdict(answer) for answer in answers],
        "seconds": {"stages": dict(seconds), "edit": edit.report.seconds},
        "versions": versions(),
        "files": dict(files),
        "linked": list(linked),
        "note": "Measured outcomes of one edit. They are not proof that the concepts cannot be recovered.",
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write a report as report.json; it gets a field `sha256`, the digest of its other fields."""
    report["sha256"] = report_digest(report)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    # A name of a file that is no UTF-8 becomes the JSON escape of its bytes.
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def report_digest(report: Mapping[str, Any]) -> str:
    """sha256 over what a report says but for its own digest, however it is spelled."""
    said = {name: value for name, value in report.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def file_digests(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, str]:
    """sha256 of every file below a folder but those left out, by its path relative to it."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in leave_out:
            digests[name] = file_digest(path)
    return digests


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
