"""`rocr apply`: apply a saved edit to a copy of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.arguments import check_quantised, edit_and_source, load, open_quantised
from rocr.cli.console import Console
from rocr.cli.outputs import check_parts, check_writable, show_adapter, write_output
from rocr.cli.parsing import Arguments, argument, command, flag
from rocr.cli.tables import number_of_concepts
from rocr.cli.values import DIR, FILE
from rocr.cli.zeros import check_kept
from rocr.errors import InputError

if TYPE_CHECKING:
    from rocr.edit.edit import Edit
    from rocr.model.load import LoadedModel, ModelSource


@command("apply")
@options.model
@argument("edit", "An edit file.", type=FILE)
@options.out("Folder to write", DIR)
@options.save
@options.stored_again
@flag("--allow-fingerprint-mismatch", "Allow another model than the edit's, such as a fine-tune.")
def apply(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Apply a saved edit to a copy of its model."""
    edit, source = edit_and_source(arguments, arguments.edit)
    report = write_applied(arguments, source, edit, console, arguments.allow_fingerprint_mismatch)
    console.say(f"{arguments.out}: {arguments.model} with the edit of {number_of_concepts(edit.concepts)}.")
    return report


def write_applied(
    arguments: Arguments,
    source: ModelSource,
    edit: Edit,
    console: Console,
    allow_fingerprint_mismatch: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Apply an edit to a model and write the folder --out.

    Args:
        arguments: of the command.
        source: the model, without the edit.
        edit: the edit.
        console: has the seconds of the stages before.
        allow_fingerprint_mismatch: whether the model may differ from the edit's.
        more: further fields of the report.

    Returns:
        The report.
    """
    from rocr.export.folder import holds_already

    check_parts(arguments, source)
    check_quantised(arguments, source)
    check_kept(edit, arguments.save)
    with console.stage("load"):
        loaded = _load(arguments, source, edit)
        open_quantised(loaded, edit.config, edit.fingerprint.layer)
    held = holds_already(loaded, edit)
    if held is not None:
        raise InputError(f"{held} holds this edit already.")
    check_writable(arguments, loaded, edit.layers)
    with console.stage("apply"):
        mismatch = edit.mismatch(loaded.model)
        edit.apply(loaded.model, allow_fingerprint_mismatch)
    if mismatch is not None:
        console.warn(f"{mismatch} The edit was measured on another model: evaluate the result.")
    more |= {"applied": True, "fingerprint_mismatch": mismatch}
    report = write_output(arguments, loaded, edit, arguments.save, console, quantised=arguments.quantised, **more)
    show_adapter(report, console, arguments.out)
    return report


def _load(arguments: Arguments, source: ModelSource, edit: Edit) -> LoadedModel:
    """Load the layers that the edit needs, or the whole model where they cannot be loaded alone."""
    from rocr.model.load_partial import partial_model

    if arguments.dtype or arguments.device == "auto":
        return load(arguments, source)
    last = max(*edit.layers, edit.fingerprint.layer)
    empty = partial_model(source, last)
    return load(arguments, source, None if empty is None else last, empty)
