"""Load probes from JSON lines, from folders of RWKU (arXiv 2406.10890) and ORT (arXiv 2506.07795), and from datasets.

The package datasets is optional and reads only "hf:" sources: its errors stop at the first invalid row of a file and do
not give its line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from rocr.argument_checks import check_path
from rocr.concepts import Kind
from rocr.errors import InputError
from rocr.evaluation.probes.probe import Probe, ProbeForm, Problems, Split, Variant, Wording, check_all
from rocr.io.boundary import calling
from rocr.io.bounded import read_bounded
from rocr.io.json_values import parse_json
from rocr.model.hub import load_dataset

HUB_PREFIX = "hf:"
PACKAGED = {name: Path(__file__).parents[2] / "data" / f"{name}.jsonl" for name in ("probes", "namesakes")}
"""The sets of the package by name: about 50 people and 20 things, and about famous namesakes of people and things."""
TEXTS = ("subject", "query", "answer", "form", "split", "cloze", "namesake_of", "kind")
FIELDS = (*TEXTS, "distractors", *get_args(Variant))
MAX_FILE_BYTES = 256 * 2**20
_FOLDER_FILE = re.compile(r"(forget|neighbor)_level(\d)\.json")
_FORM_OF_LEVEL: dict[str, ProbeForm] = {"1": "fb", "2": "qa", "3": "adversarial", "4": "mcp"}
_SPLIT_OF_FILE: dict[str, Split] = {"forget": "forget", "neighbor": "retain"}
_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")
_NUMBER_OF_TARGET = re.compile(r"^\d+_")


def load_probes(path: str | os.PathLike[str], download: bool = False) -> list[Probe]:
    """Read probes from a `.jsonl` file, from a folder of RWKU or ORT, from a Hugging Face dataset, or of the package.

    A line of a `.jsonl` file is an object with `subject`, `query` and `answer`, and optionally `distractors` (a
    list), `form` ("qa", "fb", "mcp", "adversarial", "reverse"), `split` ("forget", "retain"), `cloze`, `kind`
    ("person", "thing"), and other wordings of the question by their variant, such as "described" or "chinese" (a
    string, or an object with `query` and `answer`); see `Probe.wordings`. A probe with `namesake_of` is about a
    namesake of that concept, and has the split "retain" if it gives none.

    The names "probes" and "namesakes" stand for the sets of the package, unless a file or folder has that name:
    questions about 50 well-known people and 20 things, and about famous namesakes of people and things.

    A folder is the folder of one target, with `forget_level1.json` and similar files, or contains such folders. Its
    name is the target's name after an optional number ("1_Stephen_King"). Level 1 is the form "fb", 2 "qa",
    3 "adversarial", 4 "mcp"; files that begin with `neighbor_` have the split "retain", and their questions count
    for the target of the folder.

    A dataset is named "hf:OWNER/NAME", "hf:OWNER/NAME/CONFIGURATION" or "hf:OWNER/NAME@SPLIT", or "hf:FOLDER" for a
    local folder in the layout of a dataset. Its columns are the fields of a `.jsonl` file; other columns are ignored.
    If the configuration is named as a file of RWKU ("forget_level2"), it gives the form and split of rows without
    these columns. The default split is the only one, or else "test".

    Args:
        path: File, folder, dataset or name of a set of the package.
        download: Allow network access for a dataset on a hub; without it, only downloaded datasets are read.

    Returns:
        The probes in the order of the source.

    Raises:
        InputError: If the source cannot be read, has no probes, or has invalid ones; the message gives file and line
            (or the row, from 1) of the first 50 of them. Also if a dataset is named and the package datasets is not
            installed.
    """
    check_path("path", path)
    text = str(path)
    problems = Problems()
    if text.startswith(HUB_PREFIX):
        source, probes = _read_dataset(*parse_hub_name(text), download, problems)
        check_all(probes, problems, source)
        return probes
    place = Path(path)
    if text in PACKAGED and not place.exists():
        place = PACKAGED[text]
    if place.is_dir():
        probes = _read_folder(place, problems)
    elif place.suffix.lower() == ".jsonl":
        read = (read_probe(value, where, problems) for where, value in read_json_lines(place, problems))
        probes = [probe for probe in read if probe is not None]
    else:
        flaw = "is neither a .jsonl file nor a folder" if place.exists() else "does not exist"
        raise InputError(
            f"{place} {flaw}; give a .jsonl file, a folder of RWKU or ORT, hf:OWNER/NAME, or {' or '.join(PACKAGED)}."
        )
    check_all(probes, problems, str(place))
    return probes


def read_json_lines(path: str | os.PathLike[str], problems: Problems) -> Iterator[tuple[str, Any]]:
    """Yield the place ("file:line") and the value of each line that is not blank; add invalid JSON to `problems`.

    Raises:
        InputError: If the file cannot be read, is larger than MAX_FILE_BYTES or is not UTF-8.
    """
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            problems.add(place, f"is not valid JSON: {str(error)[:200]}")
            continue
        yield place, value


def parse_hub_name(text: str) -> tuple[str, str | None, str | None]:
    """Split the name of a dataset, such as "hf:OWNER/NAME/CONFIGURATION@SPLIT", into dataset, configuration and split.

    Raises:
        InputError: If it names no dataset.
    """
    place, _, split = text.removeprefix(HUB_PREFIX).partition("@")
    if place and Path(place).is_dir():
        return place, None, split or None
    owner, _, rest = place.partition("/")
    name, _, configuration = rest.partition("/")
    if not owner or not name:
        raise InputError(
            f"{text!r} names no dataset; write hf:OWNER/NAME or hf:OWNER/NAME/CONFIGURATION, optionally with @SPLIT "
            "at the end."
        )
    return f"{owner}/{name}", configuration or None, split or None


def read_probe(value: object, place: str, problems: Problems) -> Probe | None:
    """Build a probe from a JSON value, or add to `problems` the fields that are missing, unknown or of a wrong type.

    The rules for the values of the fields are those of `check_all`.
    """
    if not isinstance(value, Mapping):
        problems.add(place, 'must be an object: {"subject": "...", "query": "...", "answer": "..."}')
        return None
    flaws = [f"unknown field {str(name)[:60]!r}; the fields are {', '.join(FIELDS)}" for name in set(value) - {*FIELDS}]
    flaws += [f"has no {name}" for name in ("subject", "query", "answer") if name not in value]
    texts = [name for name in TEXTS if name in value]
    flaws += [f"{name} must be a string" for name in texts if not isinstance(value[name], str)]
    distractors = value.get("distractors", [])
    if not isinstance(distractors, list) or not all(isinstance(text, str) for text in distractors):
        flaws.append("distractors must be a list of strings")
    wordings: dict[Variant, Wording] = {}
    for variant in get_args(Variant):
        if variant in value:
            wording = _wording(value[variant], value.get("answer"))
            if wording is None:
                flaws.append(f"{variant} must be a string, or an object with query and answer, none of them empty")
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
        split=cast(Split, value.get("split", "retain" if "namesake_of" in value else "forget")),
        cloze=value.get("cloze"),
        wordings=wordings,
        namesake_of=value.get("namesake_of"),
        place=place,
        kind=cast(Kind | None, value.get("kind")),
    )


def _wording(value: object, answer: object) -> Wording | None:
    """Build another wording of a question from JSON; its answer is `answer` unless the value has its own."""
    if isinstance(value, Mapping):
        answer = value.get("answer", answer)
        value = value.get("query")
    if not isinstance(value, str) or not isinstance(answer, str) or not value.strip() or not answer.strip():
        return None
    return Wording(value, answer)


def _read_dataset(
    name: str, configuration: str | None, split: str | None, download: bool, problems: Problems
) -> tuple[str, list[Probe]]:
    """Return the name to show for a dataset, and the probes of its rows."""
    splits = load_dataset(name, configuration, download)
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "test")
    if chosen not in splits:
        raise InputError(f"The dataset {name} has no split {chosen!r}; it has {', '.join(splits)}.")
    defaults = _defaults_of_file(f"{configuration}.json") or {}
    shown = HUB_PREFIX + name + (f"/{configuration}" if configuration else "")
    probes = []
    with calling(f"Reading rows of the dataset {shown}"):
        for number, row in enumerate(splits[chosen], start=1):
            fields = {key: value for key, value in row.items() if key in FIELDS and value is not None}
            probe = read_probe({**defaults, **fields}, f"{shown}, row {number}", problems)
            if probe is not None:
                probes.append(probe)
    return shown, probes


def _read_folder(folder: Path, problems: Problems) -> list[Probe]:
    """Read the probes of one target's folder, or of all target folders in it."""
    probes: list[Probe] = []
    found = 0
    for path in sorted(folder.rglob("*_level?.json"), key=_natural_order):
        defaults = _defaults_of_file(path.name)
        if defaults is None:
            continue
        found += 1
        target = _NUMBER_OF_TARGET.sub("", path.parent.name).replace("_", " ")
        for place, row in _read_rows(path, problems):
            fields = {name: row[name] for name in ("query", "answer", "distractors") if name in row}
            probe = read_probe({"subject": target, **defaults, **fields}, place, problems)
            if probe is not None:
                probes.append(probe)
    if not found:
        raise InputError(
            f"{folder} holds no probes: it has no file forget_level*.json or neighbor_level*.json, which folders of "
            "RWKU and ORT have."
        )
    return probes


def _defaults_of_file(name: str) -> dict[str, Any] | None:
    """Return the form and split that the name of a file of RWKU or ORT gives; None for other names."""
    match = _FOLDER_FILE.fullmatch(name)
    if match is None or match[2] not in _FORM_OF_LEVEL:
        return None
    return {"form": _FORM_OF_LEVEL[match[2]], "split": _SPLIT_OF_FILE[match[1]]}


def _read_rows(path: Path, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place ("file:line") and the value of each object in a JSON list."""
    text = _read(path)
    try:
        rows = parse_json(text)
    except ValueError as error:
        problems.add(f"{path}:{getattr(error, 'lineno', 1)}", f"is not valid JSON: {str(error)[:200]}")
        return
    if not isinstance(rows, list):
        problems.add(f"{path}:1", "must be a list of questions")
        return
    for line, row in zip(_lines_of_elements(text, len(rows)), rows, strict=True):
        if isinstance(row, Mapping):
            yield f"{path}:{line}", row
        else:
            problems.add(f"{path}:{line}", "must be an object")


def _lines_of_elements(text: str, count: int) -> Iterator[int]:
    """Yield the line, from 1, on which each of the `count` elements of a valid JSON list begins."""
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    for _ in range(count):
        start = _BETWEEN_ELEMENTS.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, start)
        counted = start
        yield line
        _, position = decoder.raw_decode(text, start)


def _read(path: str | os.PathLike[str]) -> str:
    """Read a file of at most MAX_FILE_BYTES as UTF-8, without a byte order mark."""
    data = read_bounded(path, MAX_FILE_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is not UTF-8; convert the file.") from None


def _natural_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that puts "2_..." before "10_..."."""
    parts = re.split(r"(\d+)", str(path.parent))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts], path.name
