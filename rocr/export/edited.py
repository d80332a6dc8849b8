"""Load what `rocr unlearn` wrote: the edited model, its tokenizer and the edit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rocr.argument_checks import check_kind, check_path
from rocr.edit.edit import Edit
from rocr.edit.weight import edited_weights
from rocr.errors import InputError, VerificationError
from rocr.export.copying import EDIT_FILE
from rocr.export.manifest import open_output, shown
from rocr.model.load import LoadedModel, load_model
from rocr.model.quantised.opening import open_down_projections
from rocr.model.source import ADAPTER_GGUF, ModelSource, find_model


@dataclass(frozen=True)
class EditedModel:
    """An edited model, as `rocr.load` returns it.

    Attributes:
        model: The model with the edit applied, in evaluation mode.
        tokenizer: Its tokenizer.
        edit: The edit. `edit.revert(model)` gives the model before it.
    """

    model: nn.Module
    tokenizer: Any
    edit: Edit


@dataclass(frozen=True)
class EditedSource:
    """An edit, and where the model is that it belongs to.

    Attributes:
        folder: The output folder.
        edit: The edit.
        source: The model.
        is_applied: Whether the files of the model have the edit applied.
    """

    folder: Path
    edit: Edit
    source: ModelSource
    is_applied: bool


def load(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
) -> EditedModel:
    """Load the edited model of an output folder of rocr, its tokenizer and the edit.

    The weights have the dtype of the files, in which the edit can be reverted bit for bit. Of a quantised model, the
    down-projections up to the last edited layer are dense.

    Args:
        folder: The output folder. It must hold the edit file.
        model: The model that the edit was made for: a folder, a GGUF file, or the id of a model on a hub. The edit is
            applied to it in memory, for a folder that holds the edit or an adapter without a model. None loads the
            model of the folder.
        device: A device such as "cuda:0", or "auto" to spread the layers over all devices; None for the CPU.
        trust_remote_code: Whether code that comes with the model may run.
        download: Whether a model on a hub may be downloaded.

    Returns:
        The model, its tokenizer and the edit.

    Raises:
        InputError: The folder has no edit file, or no model and none is given; a file is damaged; or the given model
            is not the one that the edit was made for.
        VerificationError: A weight in the folder is not the one after the edit.
    """
    check_path("folder", folder)
    check_kind("model", model, (str, os.PathLike), "the path or the hub id of a model", optional=True)
    found = find_edited(folder, model, download)
    loaded = load_model(found.source, None, device, trust_remote_code)
    return edited_model(found, loaded)


def find_edited(
    folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None, download: bool = False
) -> EditedSource:
    """Read the edit of an output folder and locate its model, without loading it; arguments are those of `load`.

    Raises:
        InputError: The folder has no edit file, or no model and none is given; or a file is damaged.
    """
    path = Path(folder)
    file = path / EDIT_FILE
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is not a folder. Give the output folder of `rocr unlearn` that holds {EDIT_FILE}.")
    if not file.is_file():
        raise InputError(
            f"There is no edit file at {file}. Give an output folder that `rocr unlearn` wrote with --save edit or "
            "--save model,edit."
        )
    if model is not None:
        return EditedSource(path, Edit.load(file), find_model(os.fspath(model), download), False)
    if not _holds_model(path):
        raise InputError(
            f"{path} holds an edit without a model. Give the model that the edit was made for{_recorded_name(path)}: "
            f"model=... in Python, --model on the command line."
        )
    return EditedSource(path, Edit.load(file), find_model(str(path)), True)


def edited_model(found: EditedSource, loaded: LoadedModel) -> EditedModel:
    """Return a loaded model with its edit: its weights are checked if they have the edit, else it is applied.

    Raises:
        InputError: The model is not the one that the edit was made for.
        VerificationError: A weight is not the one after the edit.
    """
    edit = found.edit
    open_down_projections(loaded, max(*edit.layers, edit.fingerprint.layer))
    if found.is_applied:
        _check_holds(found, loaded)
    else:
        edit.apply(loaded.model)
    return EditedModel(loaded.model, loaded.tokenizer, edit)


def _holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model of its own, besides adapters."""
    others = [file for file in folder.glob("*.gguf") if file.name != ADAPTER_GGUF]
    return bool(others) or (folder / "config.json").is_file()


def _recorded_name(folder: Path) -> str:
    """Return the name of the model in the report of a folder, as a part of a sentence; empty without one."""
    report = open_output(folder, None)[0].report or {}
    name = report.get("model")
    return f" ({shown(name)})" if isinstance(name, str) and name else ""


def _check_holds(found: EditedSource, loaded: LoadedModel) -> None:
    """Raise VerificationError if a weight is not the one after the edit.

    A weight in another dtype than the recorded one is not compared: a file may hold tensors of several dtypes, and a
    model is loaded in one.
    """
    updates = found.edit.updates
    for weight, update in zip(edited_weights(loaded.architecture, updates), updates, strict=True):
        applied = update.applied
        if applied is None or applied.dtype != str(weight.dtype):
            continue
        digest = weight.digest()
        if digest != applied.after:
            held = "the weight before this edit" if digest == applied.before else "not the weight after this edit"
            raise VerificationError(
                f"{weight.name} in {found.folder} is {held}: its sha256 is {digest[:12]}, expected "
                f"{applied.after[:12]}. Check the folder with `rocr verify`, or apply the edit to the model that it "
                "was made for: model=... in Python, --model on the command line."
            )
