"""`rocr info`: show the contents of a statistics file, an edit file, a report, a GGUF file or a list of concepts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, argument, command, option
from rocr.cli.values import FILE
from rocr.errors import InputError
from rocr.io.bounded import read_bounded
from rocr.io.json_values import parse_json

MAX_REPORT_BYTES = 64 * 2**20
SHOWN_FLAWS = 5
LISTS = (".txt", ".csv", ".jsonl")
WITHOUT_REDIRECT = "the redirect of --redirect"


@command("info")
@argument(
    "file",
    "A statistics file, an edit file, an output folder, its report.json, a .gguf file or a list of concepts.",
    type=FILE,
)
@option(
    "--plot",
    "Draw an edit file as SVG: concepts with nearly the same keys, and which layer moves what. It must not exist.",
    type=FILE,
)
def info(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Show what a file written by rocr, a GGUF file or a list of concepts contains."""
    path = Path(arguments.file)
    if path.is_dir():
        path = _file_in(path)
    if arguments.plot:
        _plot(path, arguments.plot)
    header = _header(path)
    rows = [(name, _short(value)) for name, value in header.items() if name not in ("answers", "report")]
    console.table(str(path), ("what", "value"), rows)
    return header


def _plot(path: Path, target: str) -> None:
    """Draw an edit file.

    Raises:
        InputError: the file is no edit file, or the target exists or cannot be written.
    """
    from rocr.edit.edit import Edit
    from rocr.edit.pictures import edit_picture
    from rocr.io.output import check_output, new_file

    if path.suffix != ".safetensors":
        raise InputError(f"--plot draws an edit file, edit.safetensors, and {path} is none.")
    check_output(target, inputs=(path,))
    drawing = edit_picture(Edit.load(path))
    with new_file(target) as partial:
        partial.write_text(drawing.svg(standalone=True) + "\n", encoding="utf-8", errors="backslashreplace")


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
    if path.suffix.lower() in LISTS:
        return _list(path)

    from rocr.io.tensors import read_header

    return read_header(path)


def _list(path: Path) -> dict[str, Any]:
    """What a list of concepts holds.

    Raises:
        InputError: the file is no list of concepts; the message has the first flaws.
    """
    from rocr.concepts import load_concepts

    try:
        concepts = load_concepts(path, default_redirect=WITHOUT_REDIRECT)
    except InputError as error:
        flaws = str(error).splitlines()
        more = [f"and {len(flaws) - SHOWN_FLAWS:,} more lines"] if len(flaws) > SHOWN_FLAWS else []
        first = f"{path} is read as a list of concepts, by its name, but it is not a valid one:"
        raise InputError("\n".join([first, *flaws[:SHOWN_FLAWS], *more])) from None
    without = sum(concept.redirect == WITHOUT_REDIRECT for concept in concepts)
    kinds = Counter(concept.kind for concept in concepts if concept.kind is not None)
    return {
        "format": "list of concepts",
        "concepts": len(concepts),
        "aliases": sum(len(concept.aliases) for concept in concepts),
        "redirects": len({concept.redirect for concept in concepts} - {WITHOUT_REDIRECT}),
        "without a redirect": without,
        **{f"{kind}s": count for kind, count in sorted(kinds.items())},
    }


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
