"""`rocr info`: show what an output folder, a file written by rocr, a GGUF file or a list of concepts contains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, argument, command, option
from rocr.cli.values import FILE
from rocr.cli.verdicts import verdict
from rocr.errors import InputError
from rocr.io.bounded import read_bounded
from rocr.io.json_values import parse_json

MAX_REPORT_BYTES = 64 * 2**20
SHOWN_FLAWS = SHOWN_CONCEPTS = 5
LARGE_FILE = 2**20
WEIGHTS = (".safetensors", ".gguf")
"""The summary of a folder lists files of at least so many bytes, and those that hold weights."""
REPORT_FILE = "report.json"
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
    """Show what an output folder, a file written by rocr, a GGUF file or a list of concepts contains.

    Of an output folder a summary is shown; its files are shown in full, and the edit file is with --json.
    """
    path = Path(arguments.file)
    if arguments.plot:
        _plot(_file_in(path) if path.is_dir() else path, arguments.plot)
        console.say(f"The drawing is in {arguments.plot}.")
    if (path / REPORT_FILE).is_file() and not console.writes_json:
        _show_folder(path, console)
        return {}
    if path.is_dir():
        path = _file_in(path)
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


def _show_folder(folder: Path, console: Console) -> None:
    """Show a summary of an output folder from its report, without reading the other files."""
    report = _report(folder / REPORT_FILE)
    try:
        rows = summary_of_report(report)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        raise InputError(f"{folder / REPORT_FILE} is damaged: `rocr verify {folder}` says what is.") from None
    sizes = [(path.name, path.stat().st_size) for path in sorted(folder.iterdir()) if path.is_file()]
    listed = [f"{name}: {size:,} bytes" for name, size in sizes if size >= LARGE_FILE or name.endswith(WEIGHTS)]
    rows.append(("files", "\n".join(listed)))
    console.table(str(folder), ("what", "value"), rows)
    console.say(f"In full: rocr info {folder / REPORT_FILE}. `rocr verify {folder}` checks the files.")


def summary_of_report(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person asks first about an output: the rows of a table."""
    concepts, config, layers = report["concepts"], report["config"], report["layers"]
    pairs = [f"{each['name']} -> {each['redirect']}" for each in concepts[:SHOWN_CONCEPTS]]
    more = [f"and {len(concepts) - SHOWN_CONCEPTS:,} more"] if len(concepts) > SHOWN_CONCEPTS else []
    words = Counter(filter(None, (verdict(each.get("distance")) for each in concepts)))
    text, made = report["statistics"], report["versions"]
    variants = config.get("variants", "none")
    rows = [
        ("made from", str(report["model"])),
        ("state", "the edit was reverted" if report.get("applied") is False else "edited"),
        (f"{len(concepts):,} concept{'' if len(concepts) == 1 else 's'}", "\n".join([*pairs, *more])),
        ("redirection", ", ".join(f"{count:,} {word}" for word, count in words.items())),
        ("harmed", ", ".join(str(harm["name"]) for harm in report.get("harmed", []))),
        ("layers", ", ".join(f"{layer['layer']} ({100 * layer['relative_norm']:.1f}%)" for layer in layers)),
        ("settings", f"{config['method']}, ridge {config['ridge']:g}, gamma {config['gamma']:g}, variants {variants}"),
        ("ordinary text", f"{text.get('tokens', 0):,} tokens ({text.get('text', 'unknown')})"),
        ("limits passed", "\n".join(report.get("limits_passed", []))),
        ("made with", f"rocr {made['rocr']}, torch {made['torch']}, transformers {made['transformers']}"),
    ]
    return [(what, value) for what, value in rows if value]


def _file_in(folder: Path) -> Path:
    for name in ("edit.safetensors", REPORT_FILE):
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

    _check_header(path)
    from rocr.io.tensors import read_header

    return read_header(path)


def _check_header(path: Path) -> None:
    """Raise InputError if a file does not begin as a safetensors file does, before anything slow is imported."""
    if not path.is_file():
        return  # the reader says so
    with path.open("rb") as file:
        first = file.read(9)
    if len(first) < 9 or first[8:] != b"{" or int.from_bytes(first[:8], "little") > path.stat().st_size - 8:
        raise InputError(
            f"{path} is not a file that rocr shows: neither a .gguf file nor a safetensors file of rocr, by its "
            f"beginning. A list of concepts is named {', '.join(LISTS[:-1])} or {LISTS[-1]}; a report ends in .json."
        )


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
