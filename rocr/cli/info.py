"""`rocr info`: show the contents of a statistics file, an edit file, a report or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, argument, command
from rocr.cli.values import FILE
from rocr.errors import InputError
from rocr.io.bounded import read_bounded
from rocr.io.json_values import parse_json

MAX_REPORT_BYTES = 64 * 2**20


@command("info")
@argument("file", "A statistics file, an edit file, an output folder, its report.json or a .gguf file.", type=FILE)
def info(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Show what a file written by rocr, or a GGUF file, contains."""
    path = Path(arguments.file)
    if path.is_dir():
        path = _file_in(path)
    header = _header(path)
    rows = [(name, _short(value)) for name, value in header.items() if name not in ("answers", "report")]
    console.table(str(path), ("what", "value"), rows)
    return header


def _file_in(folder: Path) -> Path:
    for name in ("edit.safetensors", "report.json"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} is no output folder of rocr: it has no edit.safetensors and no report.json.")


def _header(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        return _report(path)
    if path.suffix == ".gguf":
        from rocr.model.gguf_layout import summary

        return summary(path)

    from rocr.io.tensors import read_header

    return read_header(path)


def _report(path: Path) -> dict[str, Any]:
    try:
        report = parse_json(read_bounded(path, MAX_REPORT_BYTES))
    except ValueError as error:
        raise InputError(f"{path} cannot be read as a report: {str(error)[:200]}.") from None
    if not isinstance(report, dict) or not str(report.get("format", "")).startswith("rocr report"):
        found = report.get("format") if isinstance(report, dict) else None
        other = f": its format is {found[:60]!r}" if isinstance(found, str) else ""
        raise InputError(f"{path} is not the report of an output folder{other}.")
    return report


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        shown = [", ".join(f"{name} {_short(part)}" for name, part in entry.items()) for entry in value[:10]]
        return "\n".join(shown + ([f"and {len(value) - 10} more"] if len(value) > 10 else []))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"
