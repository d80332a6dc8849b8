"""`rocr info`: show the contents of a statistics file, an edit file or a report."""

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
@argument("file", "A statistics file, an edit file, a report or an output folder.", type=FILE)
def info(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Show what a file written by rocr contains."""
    path = Path(arguments.file)
    if path.is_dir():
        path = path / "edit.safetensors" if (path / "edit.safetensors").is_file() else path / "report.json"
    header = _header(path)
    rows = [(name, _short(value)) for name, value in header.items() if name not in ("answers", "report")]
    console.table(str(path), ("what", "value"), rows)
    return header


def _header(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        return _report(path)

    from rocr.io.tensors import read_header

    return read_header(path)


def _report(path: Path) -> dict[str, Any]:
    try:
        report = parse_json(read_bounded(path, MAX_REPORT_BYTES))
    except ValueError as error:
        raise InputError(f"{path} cannot be read as a report: {str(error)[:200]}.") from None
    if not isinstance(report, dict) or not str(report.get("format", "")).startswith("rocr report"):
        raise InputError(f"{path} is not a report of rocr.")
    return report


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        shown = [", ".join(f"{name} {_short(part)}" for name, part in entry.items()) for entry in value[:10]]
        return "\n".join(shown + ([f"and {len(value) - 10} more"] if len(value) > 10 else []))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"
