"""`rocr apply` and `rocr revert`: put a saved edit onto a model, and take it off again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import add_model, claim_output, load, source_of
from rocr.cli.console import Console
from rocr.cli.outputs import EDIT_FILE, write_output
from rocr.errors import InputError
from rocr.output import new_directory

if TYPE_CHECKING:
    from rocr.edit import Edit
    from rocr.models import LoadedModel, ModelSource


def add_parsers(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add both commands."""
    parser = subparsers.add_parser("apply", parents=[common], help="put a saved edit onto a copy of its model")
    add_model(parser)
    parser.add_argument("edit", metavar="EDIT", help="an edit file")
    parser.add_argument("--allow-fingerprint-mismatch", action="store_true", help="for a close relative of the model")
    _add_out(parser)
    parser.set_defaults(run=run_apply)
    parser = subparsers.add_parser("revert", parents=[common], help="take an edit off again, bit for bit")
    add_model(parser)
    parser.add_argument("--edit", metavar="EDIT", help=f"the edit file (default: {EDIT_FILE} in the model's folder)")
    _add_out(parser)
    parser.set_defaults(run=run_revert)


def run_apply(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write a model with the edit."""
    edit, loaded = _load(arguments, arguments.edit, console)
    with console.stage("apply"):
        mismatch = edit.mismatch(loaded.model)
        edit.apply(loaded.model, arguments.allow_fingerprint_mismatch)
    if mismatch is not None:
        console.warn(f"{mismatch} It is on another model than it was measured on: evaluate the result.")
    report = write_output(
        arguments, loaded, edit, ("model", "edit"), console, applied=True, fingerprint_mismatch=mismatch
    )
    _say(arguments, edit, console, "with")
    return report


def run_revert(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write the model as it was before the edit: from its originals where the folder keeps them."""
    from rocr.originals import has_originals

    if arguments.edit is None and has_originals(Path(arguments.model)):
        return _restore(arguments, console)
    place = arguments.edit or Path(arguments.model) / EDIT_FILE
    edit, loaded = _load(arguments, place, console)
    with console.stage("revert"):
        edit.revert(loaded.model)
    report = write_output(arguments, loaded, edit, ("model",), console, applied=False)
    _say(arguments, edit, console, "without")
    return report


def _restore(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write the first files of a model, which needs neither the model nor the edit."""
    from rocr.originals import restore_originals

    folder = Path(arguments.model)
    claim_output(arguments, (folder,))
    with (
        console.stage("restore"),
        new_directory(arguments.out, inputs=(folder,), overwrite=arguments.overwrite) as partial,
    ):
        files = restore_originals(folder, partial)
    console.say(f"{arguments.out}: the first {len(files)} files of the model in {folder}, each with its first sha256.")
    return {"out": arguments.out, "applied": False, "originals": files, "seconds": console.seconds}


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")


def _load(arguments: argparse.Namespace, place: str | Path, console: Console) -> tuple[Edit, LoadedModel]:
    source = source_of(arguments)
    if not Path(place).is_file():
        raise InputError(f"There is no edit file at {place}.")
    claim_output(arguments, (*source.inputs, place))

    from rocr.edit import Edit

    edit = Edit.load(place)
    with console.stage("load"):
        return edit, load(arguments, source, _last_layer(arguments, source, edit))


def _last_layer(arguments: argparse.Namespace, source: ModelSource, edit: Edit) -> int | None:
    """The last layer to load, since what comes after is not changed; None: the whole model."""
    from rocr.partial import can_load_partially

    last = max(*edit.layers, edit.fingerprint.layer)
    if arguments.dtype or arguments.device == "auto" or not can_load_partially(source, last):
        return None
    return last


def _say(arguments: argparse.Namespace, edit: Edit, console: Console, done: str) -> None:
    console.say(f"{arguments.out}: {arguments.model} {done} the edit of {len(edit.concepts)} concepts.")
