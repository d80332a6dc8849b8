"""An edit whose list of concepts changes: that of an output folder, whose first model is restored, or an edit file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.arguments import claim_output, load
from rocr.cli.console import Console
from rocr.cli.outputs import EDIT_FILE
from rocr.cli.parsing import Arguments
from rocr.errors import InputError
from rocr.io.output import temporary_directory

if TYPE_CHECKING:
    from rocr.edit.edit import Edit
    from rocr.model.load import LoadedModel, ModelSource


@dataclass(frozen=True)
class Edited:
    """An edit whose list of concepts changes.

    Attributes:
        place: the folder or file, as the user named it.
        edit: the edit.
        folder: the output folder with the edited model; None for an edit file alone.
        source: the model in the folder; None for an edit file alone.
        report: report.json of the folder; empty without one.
    """

    place: str
    edit: Edit
    folder: Path | None
    source: ModelSource | None
    report: dict[str, Any]

    @property
    def parts(self) -> tuple[str, ...]:
        """What the folder holds, as --save names it; for an edit file, the default of `rocr unlearn`."""
        if self.folder is None or self.source is None:
            return ("model", "edit")

        from rocr.export.copying import ADAPTER_FOLDER
        from rocr.export.originals import has_originals
        from rocr.model.source import ADAPTER_GGUF

        has = {
            "lora": (self.folder / ADAPTER_FOLDER).is_dir(),
            "gguf-lora": (self.folder / ADAPTER_GGUF).is_file(),
            "originals": has_originals(self.folder),
        }
        return ("gguf" if self.source.gguf else "model", "edit", *(part for part, there in has.items() if there))

    @property
    def quantised(self) -> str | None:
        """How the edited weights of a quantised model are written, "plain" or "keep"; None for other models."""
        written = self.report.get("quantised")
        output = written.get("output") if isinstance(written, dict) else None
        return output if output in ("plain", "keep") else None


def open_edited(place: str) -> Edited:
    """Read the edit of an output folder, or an edit file.

    Raises:
        InputError: there is no edit file, it is damaged, or the folder holds no model.
    """
    from rocr.edit.edit import Edit
    from rocr.export.manifest import open_output
    from rocr.model.load import find_model

    path = Path(place)
    file = path / EDIT_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"There is no edit file at {file}. Give an output folder of rocr, or an edit file.")
    if not path.is_dir():
        return Edited(place, Edit.load(file), None, None, {})
    try:
        source = find_model(place)
    except InputError as error:
        raise InputError(f"{error} To change its edit alone, give {file}.") from None
    return Edited(place, Edit.load(file), path, source, open_output(path, None)[0].report or {})


def claim_out(arguments: Arguments, edited: list[Edited]) -> None:
    """Check that --out can be written without harm to the inputs, and lock it until the command ends."""
    claim_output(arguments, [each.place for each in edited])


@contextmanager
def restored_base(arguments: Arguments, edited: Edited, console: Console) -> Iterator[ModelSource]:
    """Restore the model that an output folder was made from, in a temporary folder beside --out.

    Its files are restored from the originals if the folder keeps them, and else by the edit's undo data, as
    `rocr revert` does it.

    Raises:
        InputError: the folder has neither originals nor undo data.
        VerificationError: a file or a weight is not as the edit left it.
    """
    from rocr.export.originals import has_originals, restore_originals
    from rocr.model.load import find_model

    assert edited.folder is not None, "an edit file has no model"
    with temporary_directory(arguments.out) as place:
        with console.stage("restore"):
            if has_originals(edited.folder):
                restore_originals(edited.folder, place)
            else:
                _revert_files(arguments, edited, place)
        name = edited.report.get("model")
        yield replace(find_model(str(place)), name=name if isinstance(name, str) and name else edited.place)


def reverts_in(source: ModelSource, edit: Edit) -> tuple[bool, bool]:
    """Whether an edit is reverted in the bytes of a GGUF file, and whether in those of any file."""
    from rocr.export.gguf import reverts_in_file
    from rocr.model.stored_weights import find_weights

    in_gguf = reverts_in_file(source, edit)
    return in_gguf, in_gguf or find_weights(source) is not None


def structure_of(arguments: Arguments, source: ModelSource) -> LoadedModel:
    """The model to revert without its weights, since its files are edited in place of it."""
    if source.folder is None:
        return load(arguments, source)

    from rocr.model.load import LoadedModel
    from rocr.model.load_partial import empty_model

    return LoadedModel(empty_model(source, arguments.trust_remote_code), None, source)


def _revert_files(arguments: Arguments, edited: Edited, place: Path) -> None:
    """Write the files of an output folder with its edit reverted."""
    from rocr.export.folder import save_edited
    from rocr.export.gguf import save_edited_gguf

    assert edited.source is not None, "an edit file has no model"
    in_gguf, in_files = reverts_in(edited.source, edited.edit)
    if not in_files:
        raise InputError(
            f"{edited.place} has neither originals nor weights that the edit can be undone in. Give its edit file "
            f"{EDIT_FILE} instead, and apply the result to the first model."
        )
    loaded = structure_of(arguments, edited.source)
    if in_gguf:
        save_edited_gguf(loaded, edited.edit, place, reverted=True)
    else:
        save_edited(loaded, edited.edit, place, reverted=True)
