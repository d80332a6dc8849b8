"""Read concept files (.txt, .csv and .jsonl) as lines of fields, whose values are not checked here."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rocr.errors import InputError
from rocr.io.bounded import read_bounded

MAX_FILE_BYTES = 64 * 2**20
FIELDS = ("name", "redirect", "aliases", "kind")

Fields = dict[str, object]
Report = Callable[[int, str], None]
_Lines = Iterable[tuple[int, str]]
_OTHER_ARROWS = ("=>", "-->", "\N{RIGHTWARDS ARROW}", "\N{RIGHTWARDS DOUBLE ARROW}")
_TXT_FORM = "write: name | alias | alias -> redirect"


def read_fields(path: Path, report: Report) -> Iterator[tuple[int, Fields]]:
    """Yield the line number (from 1) and the fields of every concept in a file.

    Args:
        path: A .txt, .csv or .jsonl file.
        report: A function that is called with the number of a wrong line and what is wrong; the line is skipped.

    Raises:
        InputError: The file cannot be read, or its name has another ending.
    """
    parsers = {".txt": _parse_txt, ".csv": _parse_csv, ".jsonl": _parse_jsonl}
    parse = parsers.get(path.suffix.lower())
    if parse is None:
        raise InputError(f"{path} is not a concept file: its name must end in {', '.join(parsers)}.")
    return parse(_decoded_lines(read_bounded(path, MAX_FILE_BYTES), report), report)


def _decoded_lines(contents: bytes, report: Report) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line, without its line end; report and skip lines that are not UTF-8."""
    offset = 0
    for number, line in enumerate(io.BytesIO(contents), start=1):
        try:
            text = line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at offset {offset + error.start:,}"
            report(number, f"is not UTF-8: {byte} ({error.reason})")
        else:
            yield number, text.removeprefix("\ufeff") if number == 1 else text
        offset += len(line)


def _parse_txt(lines: _Lines, report: Report) -> Iterator[tuple[int, Fields]]:
    for number, line in lines:
        text = "" if line.lstrip().startswith("#") else re.split(r"\s#(?:\s|$)", line, maxsplit=1)[0]
        if not text.strip(" \t"):
            continue
        arrow = next((arrow for arrow in _OTHER_ARROWS if arrow in text), None)
        names, *redirects = text.split("->")
        if arrow is not None and (arrow == "-->" or not redirects):
            report(number, f"has {arrow!r} in place of '->'; {_TXT_FORM}")
        elif len(redirects) > 1:
            report(number, f"has more than one '->'; {_TXT_FORM}")
        elif redirects and "|" in redirects[0]:
            report(number, f"has a '|' after '->'; {_TXT_FORM}")
        else:
            name, *aliases = _split(names)
            redirect = {"redirect": redirects[0].strip(" \t")} if redirects else {}
            yield number, {"name": name, "aliases": aliases, **redirect}


def _parse_csv(lines: _Lines, report: Report) -> Iterator[tuple[int, Fields]]:
    rows = _csv_rows(lines, report)
    number, header = next(rows, (1, []))
    if not _header_is_usable(number, header, report):
        return
    for number, row in rows:
        if len(row) > len(header):
            columns = f"{len(row)} cells where the header has {len(header)}"
            report(number, f"has {columns}; put a name that holds a comma in double quotes")
            continue
        fields: Fields = {"name": "", **{column: cell for column, cell in zip(header, row, strict=False) if cell}}
        if "aliases" in fields:
            fields["aliases"] = _split(str(fields["aliases"]))
        yield number, fields


def _csv_rows(lines: _Lines, report: Report) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the stripped cells of every row that is not blank."""
    pulled: list[int] = []

    def feed() -> Iterator[str]:
        for number, line in lines:
            pulled.append(number)
            yield f"{line}\n"

    rows = csv.reader(feed(), strict=True)
    while True:
        pulled.clear()
        try:
            row = [cell.strip(" \t") for cell in next(rows)]
        except StopIteration:
            return
        except csv.Error as error:  # the reader continues with the next line
            report(pulled[0], f"is not valid CSV: {error}")
        else:
            if any(row):
                yield pulled[0], row


def _header_is_usable(number: int, header: list[str], report: Report) -> bool:
    flaws = [f"unknown column {column[:60]!r}" for column in header if column not in FIELDS]
    flaws += [f"column {column!r} occurs twice" for column in FIELDS if header.count(column) > 1]
    flaws += [] if "name" in header else ["there is no column 'name'"]
    for flaw in flaws:
        report(number, f"{flaw}; the header names the columns {', '.join(FIELDS)}")
    return not flaws


def _parse_jsonl(lines: _Lines, report: Report) -> Iterator[tuple[int, Fields]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_unique_fields)
        except json.JSONDecodeError as error:
            report(number, f"is not valid JSON: {error.msg} at character {error.colno}")
        except RecursionError:
            report(number, "is not valid JSON for concepts: it is nested too deeply")
        except ValueError as error:
            report(number, f"is not valid JSON for concepts: {error}")
        else:
            if isinstance(value, dict):
                yield number, value
            else:
                report(number, 'must hold an object: {"name": "...", "redirect": "..."}')


def _unique_fields(pairs: list[tuple[str, object]]) -> Fields:
    fields: Fields = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"field {name[:60]!r} occurs twice")
        fields[name] = value
    return fields


def _split(names: str) -> list[str]:
    return [name.strip(" \t") for name in names.split("|")]
