"""`rocr revert`: write a model as it was before an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rocr.cli import options
from rocr.cli.arguments import claim_output, edit_and_source, load
from rocr.cli.base import reverts_in, structure_of
from rocr.cli.console import Console
from rocr.cli.outputs import EDIT_FILE, write_output
from rocr.cli.parsing import Arguments, command, option
from rocr.cli.tables import number_of_concepts
from rocr.cli.values import DIR, FILE
from rocr.io.output import new_directory


@command("revert")
@options.model
@options.out("Folder to write", DIR)
@option("--edit", f"The edit file (default: {EDIT_FILE} in the model's folder).", type=FILE)
def revert(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Undo an edit, bit for bit.

    The original files are restored if the folder keeps them (`rocr unlearn --save originals`).
    """
    from rocr.export.originals import has_originals

    if arguments.edit is None and has_originals(Path(arguments.model)):
        return _restore(arguments, console)
    place = arguments.edit or _folder(arguments.model) / EDIT_FILE
    edit, source = edit_and_source(arguments, place)
    in_gguf, in_files = reverts_in(source, edit)
    if in_files and (arguments.dtype or arguments.device):
        console.warn("--dtype and --device have no effect: the edit is undone in the files, and no weight is loaded.")
    with console.stage("load"):
        loaded = structure_of(arguments, source) if in_files else load(arguments, source)
    if not in_files:
        with console.stage("revert"):
            edit.revert(loaded.model)
    parts = ("gguf",) if in_gguf else ("model",)
    report = write_output(arguments, loaded, edit, parts, console, reverted=True, applied=False)
    console.say(f"{arguments.out}: {arguments.model} without the edit of {number_of_concepts(edit.concepts)}.")
    return report


def _folder(model: str) -> Path:
    """The folder of a model: its own, or the one that its .gguf file is in."""
    path = Path(model)
    return path.parent if path.is_file() else path


def _restore(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Write the original files of a model, for which neither its weights nor the edit are loaded."""
    from rocr.export.originals import restore_originals

    folder = Path(arguments.model)
    claim_output(arguments, (folder,))
    with (
        console.stage("restore"),
        new_directory(arguments.out, inputs=(folder,), overwrite=arguments.overwrite) as partial,
    ):
        files = restore_originals(folder, partial)
    console.say(f"{arguments.out}: original files of the model in {folder}: {len(files)}; each sha256 matches.")
    return {"out": arguments.out, "applied": False, "originals": files, "seconds": console.seconds}
