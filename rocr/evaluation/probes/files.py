"""Probe files: JSON lines, and the folders of RWKU (arXiv 2406.10890) and ORT (arXiv 2506.07795)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from rocr.errors import InputError
from rocr.evaluation.probes.probe import Probe, ProbeForm, Problems, Split, Variant, Wording
from rocr.io.bounded import read_bounded
from rocr.io.json_values import parse_json

FIELDS = ("subject", "query", "answer", "distractors", "form", "split", "cloze", *get_args(Variant))
MAX_FILE_BYTES = 256 * 2**20
FOLDER_FILE = re.compile(r"(forget|neighbor)_level(\d)\.json")
FORM_OF_LEVEL: dict[str, ProbeForm] = {"1": "fb", "2": "qa", "3": "adversarial", "4": "mcp"}
SPLIT_OF_FILE: dict[str, Split] = {"forget": "forget", "neighbor": "retain"}
_NEXT_ELEMENT = re.compile(r"[\s,]*")
_TARGET_FOLDER = re.compile(r"^\d+_")


def read_jsonl(path: Path, problems: Problems) -> list[Probe]:
    """The probes of a file with one object a line; what is wrong is noted and left out."""
    probes = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            problems.add(place, f"is not valid JSON: {str(error)[:200]}")
            continue
        probe = read_probe(value, place, problems)
        if probe is not None:
            probes.append(probe)
    return probes


def read_folder(folder: Path, problems: Problems) -> list[Probe]:
    """The probes of one target's folder, or of all target folders in it.

    Level 1 is "fb", 2 "qa", 3 "adversarial", 4 "mcp"; `neighbor_` files are what is to be kept. Each belongs to
    the target that its folder is named after ("1_Stephen_King"), so that a neighbour's score is its target's.
    """
    probes: list[Probe] = []
    found = 0
    for path in sorted(folder.rglob("*_level?.json"), key=_natural):
        match = FOLDER_FILE.fullmatch(path.name)
        if match is None or match[2] not in FORM_OF_LEVEL:
            continue
        found += 1
        target = _TARGET_FOLDER.sub("", path.parent.name).replace("_", " ")
        for place, fields in _rows(path, problems):
            fields = {name: fields[name] for name in ("query", "answer", "distractors") if name in fields}
            defaults = {"subject": target, "form": FORM_OF_LEVEL[match[2]], "split": SPLIT_OF_FILE[match[1]]}
            probe = read_probe({**defaults, **fields}, place, problems)
            if probe is not None:
                probes.append(probe)
    if not found:
        raise InputError(f"{folder} holds no forget_level*.json or neighbor_level*.json, as RWKU and ORT have them.")
    return probes


def _rows(path: Path, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSON list, and the line on which each begins."""
    text = _read(path)
    try:
        rows = parse_json(text)
    except ValueError as error:
        problems.add(f"{path}:{getattr(error, 'lineno', 1)}", "is not valid JSON")
        return
    if not isinstance(rows, list):
        problems.add(f"{path}:1", "must hold a list of questions")
        return
    for line, row in zip(_lines(text, len(rows)), rows, strict=True):
        if isinstance(row, Mapping):
            yield f"{path}:{line}", row
        else:
            problems.add(f"{path}:{line}", "must be an object")


def _lines(text: str, count: int) -> Iterator[int]:
    """For each of the elements of a valid JSON list the line on which it begins, from 1."""
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    for _ in range(count):
        start = _NEXT_ELEMENT.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, start)
        counted = start
        yield line
        _, position = decoder.raw_decode(text, start)


def read_probe(value: object, place: str, problems: Problems) -> Probe | None:
    """A probe from JSON, if its fields have the right types; the rules for their values are not known here."""
    if not isinstance(value, Mapping):
        problems.add(place, 'must hold an object: {"subject": "...", "query": "...", "answer": "..."}')
        return None
    flaws = [f"unknown field {str(name)[:60]!r}; the fields are {', '.join(FIELDS)}" for name in set(value) - {*FIELDS}]
    flaws += [f"has no {name}" for name in ("subject", "query", "answer") if name not in value]
    texts = [name for name in ("subject", "query", "answer", "form", "split", "cloze") if name in value]
    flaws += [f"{name} must be a text" for name in texts if not isinstance(value[name], str)]
    distractors = value.get("distractors", [])
    if not isinstance(distractors, list) or not all(isinstance(text, str) for text in distractors):
        flaws.append("distractors must be a list of texts")
    wordings: dict[Variant, Wording] = {}
    for variant in get_args(Variant):
        if variant in value:
            wording = _wording(value[variant], value.get("answer"))
            if wording is None:
                flaws.append(f"{variant} must be a text, or an object with query and answer")
            else:
                wordings[variant] = wording
    for flaw in flaws:
        problems.add(place, flaw)
    if flaws:
        return None
    return Probe(
        subject=value["subject"],
        query=value["query"],
        answer=value["answer"],
        distractors=tuple(distractors),
        form=cast(ProbeForm, value.get("form", "qa")),
        split=cast(Split, value.get("split", "forget")),
        cloze=value.get("cloze"),
        wordings=wordings,
        place=place,
    )


def _wording(value: object, answer: object) -> Wording | None:
    if isinstance(value, Mapping):
        answer = value.get("answer", answer)
        value = value.get("query")
    if not isinstance(value, str) or not isinstance(answer, str) or not value.strip() or not answer.strip():
        return None
    return Wording(value, answer)


def _read(path: Path) -> str:
    data = read_bounded(path, MAX_FILE_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is not UTF-8.") from None


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort "2_..." before "10_..."."""
    parts = re.split(r"(\d+)", str(path.parent))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts], path.name
