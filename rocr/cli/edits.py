"""`rocr apply` and `rocr revert`: put a saved edit onto a model, and take it off again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import add_model, claim_output, load, source_of
from rocr.cli.console import Console
from rocr.cli.outputs import EDIT_FILE, write_output
from rocr.errors import InputError
from rocr.io.output import new_directory

if TYPE_CHECKING:
    from rocr.edit.edit import Edit
    from rocr.model.load import LoadedModel, ModelSource


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
    from rocr.export.folder import check_output_possible, holds_already

    edit, source = _edit_and_source(arguments, arguments.edit)
    with console.stage("load"):
        loaded = load(arguments, source, _last_layer(arguments, source, edit))
    held = holds_already(loaded, edit)
    if held is not None:
        raise InputError(f"{held} holds this edit already.")
    check_output_possible(loaded, edit.layers, Path(arguments.out))
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
    from rocr.export.originals import has_originals
    from rocr.model.stored_weights import find_weights

    if arguments.edit is None and has_originals(Path(arguments.model)):
        return _restore(arguments, console)
    place = arguments.edit or Path(arguments.model) / EDIT_FILE
    edit, source = _edit_and_source(arguments, place)
    in_files = find_weights(source) is not None
    if in_files and (arguments.dtype or arguments.device):
        console.warn(
            "--dtype and --device have no effect: an edit is undone in the files' bytes, and no weight is loaded."
        )
    with console.stage("load"):
        loaded = _structure(arguments, source)
    if not in_files:
        with console.stage("revert"):
            edit.revert(loaded.model)
    report = write_output(arguments, loaded, edit, ("model",), console, reverted=True, applied=False)
    _say(arguments, edit, console, "without")
    return report


def _restore(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write the first files of a model, which needs neither the model nor the edit."""
    from rocr.export.originals import restore_originals

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


def _edit_and_source(arguments: argparse.Namespace, place: str | Path) -> tuple[Edit, ModelSource]:
    source = source_of(arguments)
    if not Path(place).is_file():
        raise InputError(f"There is no edit file at {place}.")
    claim_output(arguments, (*source.inputs, place))

    from rocr.edit.edit import Edit
    from rocr.export.copying import check_carried

    check_carried(source)
    return Edit.load(place), source


def _structure(arguments: argparse.Namespace, source: ModelSource) -> LoadedModel:
    """The model to take an edit off: without its weights where these lie in files, which are changed by themselves."""
    if source.checkpoint_folder is None:
        return load(arguments, source)

    from rocr.model.load import LoadedModel
    from rocr.model.load_partial import empty_model

    return LoadedModel(empty_model(source, arguments.trust_remote_code), None, source)


def _last_layer(arguments: argparse.Namespace, source: ModelSource, edit: Edit) -> int | None:
    """The last layer to load, since what comes after is not changed; None: the whole model."""
    from rocr.model.load_partial import can_load_partially

    last = max(*edit.layers, edit.fingerprint.layer)
    whole = arguments.dtype or arguments.device == "auto" or not can_load_partially(source, last)
    return None if whole else last


def _say(arguments: argparse.Namespace, edit: Edit, console: Console, done: str) -> None:
    console.say(f"{arguments.out}: {arguments.model} {done} the edit of {len(edit.concepts)} concepts.")
