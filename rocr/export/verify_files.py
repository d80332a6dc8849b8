"""The files of an output folder, and whether they are those that its report records."""

from __future__ import annotations

import filecmp
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocr.errors import InputError
from rocr.export.copying import MAX_CARRIED_BYTES
from rocr.export.report import FORMAT, REPORT_FILE, file_digest, report_digest
from rocr.io.json_values import parse_json
from rocr.io.safetensors_layout import read_layout

EDIT_FILE = "edit.safetensors"
ADAPTER_SETTINGS = "adapter_config.json"
MAX_REPORT_BYTES = 64 * 2**20
SHOWN_CHARACTERS = 200
PASSED, FAILED, UNCHECKED = "passed", "failed", "unchecked"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        subject: the file or tensor.
        what: which of its properties.
        state: "passed", "failed", or "unchecked" where no record tells.
        detail: what was found, or why it cannot be told.
    """

    subject: str
    what: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class Output:
    """A folder and what its records say.

    Attributes:
        folder: where report.json lies.
        part: beginning of the names to check, such as "lora/"; empty: all.
        files: the plain files below the folder by their names.
        others: names of links and of what else is no plain file.
        report: the report; None where it cannot be read.
        edit: the edit file; None where there is none.
    """

    folder: Path
    part: str
    files: dict[str, Path]
    others: set[str]
    report: dict[str, Any] | None
    edit: Path | None

    @property
    def recorded(self) -> dict[str, str]:
        """sha256 of files by their names; empty for a file that is the input's own."""
        if self.report is None:
            return {}
        files: dict[str, str] = self.report["files"]
        return files | dict.fromkeys(self.report["linked"], "")

    @property
    def is_reverted(self) -> bool:
        """Whether the weights are those before the edit."""
        return self.report is not None and self.report.get("applied") is False


def shown(text: str) -> str:
    """A name or sentence from outside that any terminal and any JSON document can hold."""
    plain = text.encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= SHOWN_CHARACTERS else plain[:SHOWN_CHARACTERS] + "…"


def open_output(folder: Path, edit: Path | None) -> tuple[Output, list[Check]]:
    """Find an output's files and read its report; see `rocr.export.verify.verify_output`."""
    if edit is not None and not edit.is_file():
        raise InputError(f"There is no edit file at {edit}.")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.")
    part = ""
    if (folder / ADAPTER_SETTINGS).is_file() and not (folder / REPORT_FILE).exists():
        home = folder.resolve()
        folder, part = home.parent, f"{home.name}/"
    if not (folder / REPORT_FILE).is_file() and (part or not (folder / EDIT_FILE).is_file()):
        raise InputError(f"{folder} is no output of rocr: it holds no {REPORT_FILE}.")
    files, others = _walk(folder)
    report, checks = _read_report(files.get(REPORT_FILE))
    return Output(folder, part, files, others, report, edit or files.get(EDIT_FILE)), checks


def _walk(folder: Path) -> tuple[dict[str, Path], set[str]]:
    """Plain files below a folder, and everything else but folders; no link is followed."""
    files: dict[str, Path] = {}
    others: set[str] = set()
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISREG(mode):
                files[name] = path
            elif not stat.S_ISDIR(mode):
                others.add(name)
    return dict(sorted(files.items())), others


def _read_report(path: Path | None) -> tuple[dict[str, Any] | None, list[Check]]:
    try:
        if path is None:
            raise ValueError("it is not there, or not a plain file")
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; the limit is {MAX_REPORT_BYTES:,}")
        report = parse_json(path.read_bytes())
        _check_report(report)
    except (OSError, ValueError) as error:
        return None, [Check(REPORT_FILE, "readable", FAILED, shown(str(error)))]
    checks = [Check(REPORT_FILE, "readable", PASSED)]
    if "sha256" not in report:
        checks.append(Check(REPORT_FILE, "sha256", UNCHECKED, "it holds no digest of itself"))
    elif report["sha256"] == report_digest(report):
        checks.append(Check(REPORT_FILE, "sha256", PASSED))
    else:
        checks.append(Check(REPORT_FILE, "sha256", FAILED, "it is not as rocr wrote it"))
    return report, checks


def _check_report(report: Any) -> None:
    """Raise ValueError unless a value is a report whose lists of files can be used."""
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"it is not a report of the kind {FORMAT!r}")
    files, linked = report.get("files"), report.get("linked")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError("its field 'files' does not give the sha256 of each file")
    if not isinstance(linked, list) or not all(isinstance(name, str) for name in linked):
        raise ValueError("its field 'linked' is not a list of files")


def file_checks(output: Output) -> Iterator[Check]:
    """Every file that is recorded, and every one that is not."""
    if output.report is None:
        yield Check("other files", "sha256", UNCHECKED, f"{REPORT_FILE} cannot be read")
        return
    for name, digest in sorted(output.recorded.items()):
        if not name.startswith(output.part):
            continue
        path, what = output.files.get(name), "sha256" if digest else "linked"
        if path is None:
            reason = "it is a link, or something else that is no plain file"
            yield Check(shown(name), what, FAILED, reason if name in output.others else "it is missing")
        else:
            yield _digest_check(name, path, digest) if digest else _linked_check(name, path, output.report)
    known = {REPORT_FILE, *output.recorded}
    for name in sorted({*output.files, *output.others} - known):
        if name.startswith(output.part):
            yield Check(shown(name), "recorded", FAILED, "no record names it")


def _digest_check(name: str, path: Path, digest: str) -> Check:
    try:
        check_claimed_size(path)
        found = file_digest(path)
    except InputError as error:
        return Check(shown(name), "sha256", FAILED, shown(str(error)))
    except OSError as error:
        return Check(shown(name), "sha256", FAILED, f"it cannot be read: {error.strerror}")
    if found == digest:
        return Check(shown(name), "sha256", PASSED)
    return Check(shown(name), "sha256", FAILED, f"it is {found[:12]}, recorded was {shown(digest)[:12]}")


def check_claimed_size(path: Path) -> None:
    """Refuse a file that claims more bytes than it can have: a sparse one takes hours to read.

    Raises:
        InputError: it is larger than any file without weights, and its header does not say so.
    """
    size = path.stat().st_size
    if size <= MAX_CARRIED_BYTES:
        return
    if path.suffix == ".safetensors":
        read_layout(path)
    elif path.suffix != ".gguf":
        raise InputError(f"it claims {size:,} bytes; the limit for a file without weights is {MAX_CARRIED_BYTES:,}")


def _linked_check(name: str, path: Path, report: dict[str, Any]) -> Check:
    """A file that was the input's own when the output was made, and was not read then."""
    model = report.get("model")
    unread = "its bytes were not read when it was linked"
    try:
        source = Path(model if isinstance(model, str) else "", name)
        if not isinstance(model, str) or not source.is_file():
            reason = f"{unread}, and the model {shown(json.dumps(model))} is not here to compare"
            return Check(shown(name), "linked", UNCHECKED, reason)
        if source.samefile(path):
            return Check(shown(name), "linked", PASSED, f"it is the model's own file; {unread}")
        if filecmp.cmp(source, path, shallow=False):
            return Check(shown(name), "linked", PASSED, "it has the bytes of the model's own file")
    except (OSError, ValueError) as error:
        return Check(shown(name), "linked", UNCHECKED, shown(f"it cannot be compared: {error}"))
    return Check(shown(name), "linked", FAILED, f"it differs from {shown(str(source))}")
