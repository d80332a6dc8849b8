"""`rocr remove` and `rocr merge`: change the concepts of an edit by what it holds, without text and statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rocr.cli import options
from rocr.cli.apply import write_applied
from rocr.cli.arguments import start_running
from rocr.cli.base import Edited, claim_out, open_edited, restored_base
from rocr.cli.console import Console
from rocr.cli.parsing import Arguments, argument, command
from rocr.cli.tables import number_of_concepts
from rocr.cli.values import FILE
from rocr.concepts import check_names, folded
from rocr.errors import InputError

if TYPE_CHECKING:
    from rocr.edit.edit import Edit

OUTPUT = "Folder to write, or edit file if no folder is given"
FOR_FOLDERS = ("save", "lora_rank", "gguf_type", "dtype", "device", "trust_remote_code")


@command("remove")
@argument("edited", "An output folder of rocr, or an edit file.", type=FILE)
@argument("names", "Names or aliases of the concepts to remove.", nargs=-1, required=True)
@options.out(OUTPUT)
@options.save_again
@options.loading
def remove(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Remove concepts from an edit.

    Of an output folder, the first model is restored, and the edit of the other concepts is applied to it.
    """
    start_running(arguments)
    check_names("The name", arguments.names)
    _check_distinct(arguments.names)
    edited = open_edited(arguments.edited)
    _check_options(arguments, [edited])
    claim_out(arguments, [edited])
    with console.stage("solve"):
        changed = edited.edit.remove(arguments.names)
    return _write(arguments, edited, changed, console, removed=list(arguments.names))


@command("merge")
@argument("edited", "Output folders of rocr, or edit files, of one model.", type=FILE, nargs=-1, required=True)
@options.out(OUTPUT)
@options.save_again
@options.loading
def merge(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Merge edits of one model into one edit of all their concepts.

    If folders are given, the first model of the first of them is restored, and the edit is applied to it.
    """
    start_running(arguments)
    if len(arguments.edited) < 2:
        raise InputError(f"Only {arguments.edited[0]} is given: give at least two folders or edit files to merge.")
    edited = [open_edited(place) for place in arguments.edited]
    _check_options(arguments, edited)
    claim_out(arguments, edited)
    with console.stage("solve"):
        merged = edited[0].edit
        for other in edited[1:]:
            merged = merged.merge(other.edit)
    base = next((each for each in edited if each.folder is not None), edited[0])
    return _write(arguments, base, merged, console, merged=list(arguments.edited))


def say_inexact(edit: Edit, console: Console) -> None:
    """Say which layers differ from an edit that is made of all concepts at once."""
    layers = edit.report.inexact
    if layers:
        listed = ", ".join(map(str, layers))
        console.say(
            f"Inexact in layer{'s' * (len(layers) > 1)} {listed}: by more than rounding, "
            f"{'they differ' if len(layers) > 1 else 'it differs'} from an edit made of the "
            f"{number_of_concepts(edit.concepts)} from the start."
        )


def _write(arguments: Arguments, base: Edited, edit: Edit, console: Console, **more: Any) -> dict[str, Any]:
    """Write a changed edit: as an edit file, or as a folder of the restored model with the edit applied."""
    if base.folder is None:
        with console.stage("save"):
            edit.save(arguments.out, overwrite=arguments.overwrite)
        report = {
            "out": arguments.out,
            "concepts": [concept.name for concept in edit.concepts],
            "inexact": edit.report.inexact,
            **more,
            "seconds": console.seconds,
        }
    else:
        arguments.model, arguments.quantised = base.place, base.quantised
        arguments.save = arguments.save or base.parts
        with restored_base(arguments, base, console) as source:
            report = write_applied(arguments, source, edit, console, **more)
    say_inexact(edit, console)
    console.say(f"{arguments.out}: the edit of {number_of_concepts(edit.concepts)}.")
    return report


def _check_distinct(names: tuple[str, ...]) -> None:
    """Raise InputError if a name is given twice."""
    seen: set[str] = set()
    for name in names:
        if folded(name) in seen:
            raise InputError(f"{name!r} is given twice: give each name once.")
        seen.add(folded(name))


def _check_options(arguments: Arguments, edited: list[Edited]) -> None:
    """Raise InputError if options about models are given with edit files alone, for which no model is loaded."""
    given = [name for name in FOR_FOLDERS if getattr(arguments, name)]
    if given and all(each.folder is None for each in edited):
        raise InputError(
            f"--{given[0].replace('_', '-')} is for output folders: of edit files, an edit file is made, and no model "
            "is loaded. Leave it out."
        )
