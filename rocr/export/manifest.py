"""The files of an output folder: record the sha256 of each, and check a folder as `sha256sum -c` does.

The field `files` of report.json is the manifest, and report.json holds a digest of itself. SHA256SUMS lists the same
digests for checks without rocr: `sha256sum -c SHA256SUMS`. Weight files that are hard links to those of the model have
no digest, since they are not read when the output is written; they are compared with the model's files instead.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocr.errors import InputError
from rocr.export.copying import EDIT_FILE, MAX_CARRIED_BYTES, REPORT_FILE, SUMS_FILE
from rocr.export.report import FORMAT, report_digest, write_report
from rocr.io.json_values import parse_json
from rocr.io.safetensors_layout import read_layout

ADAPTER_SETTINGS = "adapter_config.json"
MAX_REPORT_BYTES = 64 * 2**20
MAX_SHOWN_CHARACTERS = 200
PASSED, FAILED, UNCHECKED = "passed", "failed", "unchecked"


@dataclass(frozen=True)
class Check:
    """The result of one check of an output folder.

    Attributes:
        subject: The file or tensor.
        what: The property that is checked.
        state: "passed", "failed", or "unchecked" if there is no record to check against.
        detail: What was found, or why it was not checked.
    """

    subject: str
    what: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class Output:
    """An output folder and its records.

    Attributes:
        folder: The folder of report.json.
        part: Prefix of the names to check, such as "lora/". Empty for all.
        files: The regular files below the folder, by their names relative to it.
        others: Names of symbolic links and of everything else that is neither a regular file nor a folder.
        report: The report. None if it cannot be read.
        edit: The edit file. None if there is none.
    """

    folder: Path
    part: str
    files: dict[str, Path]
    others: set[str]
    report: dict[str, Any] | None
    edit: Path | None

    @property
    def recorded(self) -> dict[str, str]:
        """sha256 of the recorded files by name. Empty for a file that is a hard link to a file of the model."""
        if self.report is None:
            return {}
        files: dict[str, str] = self.report["files"]
        return files | dict.fromkeys(self.report["linked"], "")

    @property
    def names(self) -> list[str]:
        """Names of all files to check, recorded or not, except the report."""
        found = {*self.recorded, *self.files, *self.others} - {REPORT_FILE}
        return sorted(name for name in found if name.startswith(self.part))

    @property
    def is_reverted(self) -> bool:
        """Whether the weights are those before the edit."""
        return self.report is not None and self.report.get("applied") is False


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digests(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, str]:
    """Return the sha256 of every file below a folder except those left out, by the path relative to the folder."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: file_digest(path) for name, path in names.items() if name not in leave_out}


def write_records(report: dict[str, Any], folder: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS and report.json, and set the fields `files` and `sha256` of the report.

    Args:
        report: The report, with the names of linked files in the field `linked`.
        folder: The output, complete except for these two files.
        known: sha256 of files that are already known.
    """
    digests = file_digests(folder, [*report["linked"], *known]) | dict(known)
    (folder / SUMS_FILE).write_bytes(b"".join(_sum_line(name, digest) for name, digest in digests.items()))
    report["files"] = digests | {SUMS_FILE: file_digest(folder / SUMS_FILE)}
    write_report(report, folder)


def _sum_line(name: str, digest: str) -> bytes:
    """Return a line of SHA256SUMS. As in coreutils, a backslash before the digest marks a name with escapes."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return os.fsencode(f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n")


def open_output(folder: Path, edit: Path | None) -> tuple[Output, list[Check]]:
    """Find the files of an output and read its report; see `rocr.export.verify.verify_output`."""
    if edit is not None and not edit.is_file():
        raise InputError(f"There is no edit file at {edit}.")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.")
    part = ""
    if (folder / ADAPTER_SETTINGS).is_file() and not (folder / REPORT_FILE).exists():
        adapter = folder.resolve()
        folder, part = adapter.parent, f"{adapter.name}/"
    if not (folder / REPORT_FILE).is_file() and (part or not (folder / EDIT_FILE).is_file()):
        raise InputError(f"{folder} is no output of rocr: it holds no {REPORT_FILE}.")
    files, others = _walk(folder)
    report, checks = _read_report(files.get(REPORT_FILE))
    return Output(folder, part, files, others, report, edit or files.get(EDIT_FILE)), checks


def _walk(folder: Path) -> tuple[dict[str, Path], set[str]]:
    """Return the regular files below a folder, and the names of everything else but folders; follow no link."""
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
    """Return a report and the checks of it; None instead of a report that cannot be used."""
    try:
        if path is None:
            raise ValueError("it is missing, or is not a regular file")
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; the limit is {MAX_REPORT_BYTES:,}")
        report = parse_json(path.read_bytes())
        if not isinstance(report, dict) or report.get("format") != FORMAT:
            raise ValueError(f"it is not a report in the format {FORMAT!r}")
        files, linked = report.get("files"), report.get("linked")
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise ValueError("its field 'files' does not give the sha256 of each file")
        if not isinstance(linked, list) or not all(isinstance(name, str) for name in linked):
            raise ValueError("its field 'linked' is not a list of files")
    except (OSError, ValueError) as error:
        return None, [Check(REPORT_FILE, "readable", FAILED, shown(str(error)))]
    if "sha256" not in report:
        own = Check(REPORT_FILE, "sha256", UNCHECKED, "it holds no digest of itself")
    elif report["sha256"] == report_digest(report):
        own = Check(REPORT_FILE, "sha256", PASSED)
    else:
        own = Check(REPORT_FILE, "sha256", FAILED, "it differs from what rocr wrote")
    return report, [Check(REPORT_FILE, "readable", PASSED), own]


def file_checks(output: Output) -> Iterator[Check]:
    """Check that every recorded file is there with its digest, and that every file is recorded."""
    if output.report is None:
        yield Check("other files", "sha256", UNCHECKED, f"{REPORT_FILE} cannot be read")
        return
    recorded = output.recorded
    for name in output.names:
        if name not in recorded:
            yield Check(shown(name), "recorded", FAILED, "no record names it")
            continue
        path, digest = output.files.get(name), recorded[name]
        if path is None:
            reason = "it is a link or another special file" if name in output.others else "it is missing"
            yield Check(shown(name), "sha256" if digest else "linked", FAILED, reason)
        elif digest:
            yield _digest_check(name, path, digest)
        else:
            yield _linked_check(name, path, output.report)


def _digest_check(name: str, path: Path, digest: str) -> Check:
    try:
        _check_claimed_size(path)
        found = file_digest(path)
    except InputError as error:
        return Check(shown(name), "sha256", FAILED, shown(str(error)))
    except OSError as error:
        return Check(shown(name), "sha256", FAILED, f"it cannot be read: {error.strerror}")
    if found == digest:
        return Check(shown(name), "sha256", PASSED)
    return Check(shown(name), "sha256", FAILED, f"it is {found[:12]}, recorded is {shown(digest)[:12]}")


def _check_claimed_size(path: Path) -> None:
    """Raise InputError for a file whose size is not plausible, since hashing a sparse file of 1 TB takes hours."""
    size = path.stat().st_size
    if size <= MAX_CARRIED_BYTES:
        return
    if path.suffix == ".safetensors":
        read_layout(path)  # raises unless the size is that of the header and the tensors
    elif path.suffix != ".gguf":
        raise InputError(f"it has {size:,} bytes; the limit for a file without weights is {MAX_CARRIED_BYTES:,}")


def _linked_check(name: str, path: Path, report: Mapping[str, Any]) -> Check:
    """Compare a file that was a hard link to a file of the model with that file."""
    model = report.get("model")
    unread = "its bytes were not read when it was linked"
    try:
        source = Path(model if isinstance(model, str) else "", name)
        if not isinstance(model, str) or not source.is_file():
            reason = f"{unread}, and the model {shown(json.dumps(model))} is not here to compare with"
            return Check(shown(name), "linked", UNCHECKED, reason)
        if source.samefile(path):
            return Check(shown(name), "linked", PASSED, f"it is the model's own file; {unread}")
        if filecmp.cmp(source, path, shallow=False):
            return Check(shown(name), "linked", PASSED, "it has the bytes of the model's own file")
    except (OSError, ValueError) as error:
        return Check(shown(name), "linked", UNCHECKED, shown(f"it cannot be compared: {error}"))
    return Check(shown(name), "linked", FAILED, f"it differs from {shown(str(source))}")


def shown(text: str) -> str:
    """Return a name or sentence from a file in a form that any terminal and any JSON document can hold."""
    plain = text.encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= MAX_SHOWN_CHARACTERS else plain[:MAX_SHOWN_CHARACTERS] + "…"
