"""Write an edited model as a folder: its files with the edited tensors rewritten, or as a whole where it has none.

The files' truth is kept: every tensor of them is in the output, byte for byte but for the edited ones, and these keep
the dtype that they are stored in, also where the model was loaded in another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rocr.edit.apply import apply_updates, down_projections, undo_updates
from rocr.edit.update import Applied, LayerUpdate
from rocr.errors import InputError
from rocr.export.copying import carried_files, may_link, other_weights
from rocr.export.rewrite import files_beside, rewrite_model
from rocr.io.disk_space import check_space
from rocr.io.dtypes import dtype_name
from rocr.io.safetensors_layout import StoredTensor
from rocr.model.architecture import DownProjection
from rocr.model.fingerprint import tensor_digest
from rocr.model.load import LoadedModel, save_model, saved_bytes
from rocr.model.stored_weights import StoredNames, check_loaded, find_stored, find_weights, layout, stored_names
from rocr.model.weight_files import WeightFiles, find_weight_files

if TYPE_CHECKING:
    from rocr.edit.edit import Edit


@dataclass(frozen=True)
class WrittenWeight:
    """An edited weight in the output.

    Attributes:
        layer: the decoder layer.
        parameter: its name in the loaded model.
        stored: its names in the files.
        dtype: that it is stored in.
        loaded: the dtype that it was loaded in; None where it was not, since an edit was taken off.
        surviving: share of its entries that the update changes after rounding to the stored dtype; None where an
            edit was taken off.
    """

    layer: int
    parameter: str
    stored: list[str]
    dtype: str
    loaded: str | None
    surviving: float | None


@dataclass(frozen=True)
class Saved:
    """A model that was written.

    Attributes:
        edit: the edit, with the records of what it did to the weights that were written.
        linked: weight files that are the input's own by hard links; their bytes were not read.
        report: what the output's report says of its weights.
    """

    edit: Edit
    linked: list[str]
    report: dict[str, Any]


def check_output_possible(loaded: LoadedModel, layers: Sequence[int], out: Path) -> None:
    """Refuse, before a model is edited, what could not be written afterwards.

    Raises:
        InputError: the files hold other weights than were loaded, an edited weight is stored otherwise than it is
            held, a file is too large to be carried along, or the disk is too small; says how much is missing.
    """
    files = find_weights(loaded.source)
    if files is None:
        check_space(out, saved_bytes(loaded.model))
        return
    projections = [loaded.architecture.down_projection(layer) for layer in layers]
    names = stored_names(files, loaded.model)
    check_loaded(files, names, loaded.model, projections)
    check_space(out, bytes_written(files, names, projections, out))


def bytes_written(
    files: WeightFiles, names: StoredNames, projections: Sequence[DownProjection], out: Path | None
) -> int:
    """Bytes of weights and other files that an edited copy of a folder puts onto the disk."""
    anew = weights_copied(files, names, projections, out)
    return sum((files.folder / name).stat().st_size for name in anew) + carried_bytes(files.folder)


def weights_copied(
    files: WeightFiles, names: StoredNames, projections: Sequence[DownProjection], out: Path | None
) -> list[str]:
    """Names of the weight files that take room in an edited copy: the others are hard links where there are such."""
    if not may_link(files.folder, out):
        return [*files.files, *files_beside(files, _shapes(projections))]
    return sorted({place.file.name for projection in projections for place in find_stored(files, names, projection)})


def carried_bytes(folder: Path) -> int:
    """Bytes of configuration, tokenizer and whatever else lies in a folder."""
    return sum(path.stat().st_size for path in carried_files(folder))


def save_edited(loaded: LoadedModel, edit: Edit, folder: Path, reverted: bool = False) -> Saved:
    """Write a model with an edit, or without it, into a folder that exists.

    Args:
        loaded: the model. With an edit it carries it; without, only its structure is used, where it lies in files.
        edit: the edit.
        folder: the folder to write to.
        reverted: whether the edit is taken off: from the bytes of the files, whatever the model was loaded as.

    Raises:
        InputError: the files are not those of the model; or the disk is too small.
        VerificationError: a weight to be reverted is not as the edit left it.
        GuardError: an edited weight overflows the dtype that it is stored in.
        RocrError: the disk refuses.
    """
    files = find_weights(loaded.source)
    if files is None:
        save_model(loaded, folder)
        written = find_weight_files(folder)
        return Saved(edit, [], {} if written is None else {"tensors": layout(written)})
    names = stored_names(files, loaded.model)
    projections = down_projections(loaded.architecture, edit.updates)
    changes: dict[str, Tensor] = {}
    weights, updates = [], []
    for projection, update in zip(projections, edit.updates, strict=True):
        places = find_stored(files, names, projection)
        values, record = _without(projection, update, places) if reverted else _with(projection, update, places)
        changes |= dict.fromkeys((place.name for place in places), values)
        updates.append(update if reverted else replace(update, applied=record))
        weights.append(_written(projection, update, places, None if reverted else record))
    beside = files_beside(files, _shapes(projections))
    rewritten = rewrite_model(files, changes, folder, beside)
    kept = [name for name in [*files.files, *beside] if name not in rewritten]
    if all(parameter.device.type != "meta" for parameter in loaded.model.parameters()):
        files.read_headers()
    report = {
        "weights": [asdict(weight) for weight in weights],
        "tensors": layout(files),
        "beside": beside,
        "left_out": other_weights(files.folder, [*files.files, *beside]),
    }
    linked = [name for name in kept if (folder / name).samefile(files.folder / name)]
    return Saved(replace(edit, updates=updates), linked, report)


def holds_already(loaded: LoadedModel, edit: Edit) -> str | None:
    """The first weight that the files hold with an edit in it; the loaded one shows it in the stored dtype only."""
    files = find_weights(loaded.source)
    if files is None:
        return None
    names = stored_names(files, loaded.model)
    for projection, update in zip(down_projections(loaded.architecture, edit.updates), edit.updates, strict=True):
        stored = find_stored(files, names, projection)[0]
        if update.applied is not None and tensor_digest(stored.read()) == update.applied.after:
            return update.parameter
    return None


def _with(projection: DownProjection, update: LayerUpdate, places: Sequence[StoredTensor]) -> tuple[Tensor, Applied]:
    """A weight as it is written: that of the model, or the stored one with the update, rounded once."""
    values, loaded = places[0].read(), projection.parameter.data
    applied = update.applied
    assert applied is not None, "the model carries the edit"
    if tensor_digest(values.to(loaded.dtype)) != applied.before:
        raise InputError(f"{places[0].file} does not hold {projection.parameter_name} as it was before the edit.")
    if values.dtype == loaded.dtype:
        return loaded, applied
    record = apply_updates([_holding(projection, values)], [update.factors])[0]
    return values, record


def _without(
    projection: DownProjection, update: LayerUpdate, places: Sequence[StoredTensor]
) -> tuple[Tensor, Applied | None]:
    """A stored weight as it was before the edit."""
    values = places[0].read()
    undo_updates([_holding(projection, values)], [update.applied])
    return values, update.applied


def _holding(projection: DownProjection, values: Tensor) -> DownProjection:
    """A down-projection with other values in the place of its own, which stay as they are."""
    module = nn.Module()
    module.weight = nn.Parameter(values, requires_grad=False)
    return replace(projection, module=module)


def _written(
    projection: DownProjection, update: LayerUpdate, places: Sequence[StoredTensor], record: Applied | None
) -> WrittenWeight:
    undo = None if record is None else record.undo
    return WrittenWeight(
        update.layer,
        update.parameter,
        [place.name for place in places],
        str(places[0].dtype).removeprefix("torch."),
        None if projection.parameter.device.type == "meta" else dtype_name(projection.parameter.dtype),
        None if undo is None else float((undo != 0).to(torch.float64).mean()),
    )


def _shapes(projections: Sequence[DownProjection]) -> set[tuple[int, ...]]:
    return {tuple(projection.parameter.shape) for projection in projections}
