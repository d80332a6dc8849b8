"""Write an edited model to a folder: as its own files with the edited tensors replaced, or as new files if it has none.

All other tensors of the model's files keep their bytes. The edited ones keep their stored dtype, even if the model was
loaded in another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rocr.edit.apply import apply_updates, undo_updates
from rocr.edit.update import Applied, LayerUpdate
from rocr.edit.weight import Weight, edited_weights
from rocr.errors import InputError, VerificationError
from rocr.export.copying import REPLACED_FILE, carried_files, may_link, other_weights
from rocr.export.quantised import (
    PLAIN,
    WrittenQuantised,
    check_plain,
    check_surviving,
    edit_quantised,
    report_of,
    with_values,
)
from rocr.export.replaced import (
    has_replaced,
    kept_parts,
    names_added,
    replaced_by,
    replacements,
    restore_replaced,
    save_replaced,
)
from rocr.export.replacing import Replacements
from rocr.export.rewrite import files_beside, rewrite_model
from rocr.export.written import written_plain, written_quantised
from rocr.io.disk_space import check_space
from rocr.io.dtypes import torch_dtype
from rocr.model.block import Block
from rocr.model.blocks import find_blocks
from rocr.model.fingerprint import tensor_digest
from rocr.model.load import LoadedModel, save_model, saved_bytes
from rocr.model.quantised.checkpoint import find_quantisation
from rocr.model.stored_names import StoredNames, stored_names
from rocr.model.stored_weights import (
    Place,
    check_loaded,
    edited_places,
    find_quantised,
    find_stored,
    find_weights,
    layout,
    replaced_weights,
)
from rocr.model.weight_files import WeightFiles, find_weight_files

if TYPE_CHECKING:
    from rocr.edit.edit import Edit

Places = Sequence[Sequence[Place]]
"""For each block of a weight, where the files hold it."""


@dataclass(frozen=True)
class Saved:
    """A written model.

    Attributes:
        edit: The edit, with the records of how it changed the written weights.
        linked: Names of the weight files that are hard links to those of the model. Their bytes were not read.
        report: Fields of the output's report about its weights.
    """

    edit: Edit
    linked: list[str]
    report: dict[str, Any]


def check_output_possible(loaded: LoadedModel, layers: Sequence[int], out: Path, quantised: str = PLAIN) -> None:
    """Check, before a model is edited, that the result can be written.

    Args:
        loaded: The model.
        layers: The layers that are edited.
        out: The folder to write to.
        quantised: How edited weights of a quantised model are written, "plain" or "keep".

    Raises:
        InputError: The files hold other weights than the loaded ones, an edited weight is stored in another shape, a
            file is too large to be copied, or there is too little free disk space.
    """
    files = find_weights(loaded.source)
    if files is None:
        check_space(out, saved_bytes(loaded.model))
        return
    blocks = [block for layer in find_blocks(loaded.architecture, layers).values() for block in layer.blocks]
    names = stored_names(files, loaded.model)
    if quantised == PLAIN:
        check_plain(names, blocks)
    check_loaded(files, names, loaded.model, blocks)
    check_space(out, bytes_written(files, names, blocks, out))


def bytes_written(files: WeightFiles, names: StoredNames, blocks: Sequence[Block], out: Path | None) -> int:
    """Return the number of bytes that writing an edited copy of a folder takes on the disk."""
    anew = weights_copied(files, names, blocks, out)
    size = sum((files.folder / name).stat().st_size for name in anew) + carried_bytes(files.folder)
    return size + replaced_bytes(names, blocks)


def replaced_bytes(names: StoredNames, blocks: Sequence[Block]) -> int:
    """Return the most bytes that quantised weights add to an output: their plain values and their former parts."""
    weights = {weight.module: weight for block in blocks for weight in replaced_weights(names, block)}
    return sum(4 * math.prod(weight.shape) + weight.size for weight in weights.values())


def weights_copied(files: WeightFiles, names: StoredNames, blocks: Sequence[Block], out: Path | None) -> list[str]:
    """Return the names of the weight files that an edited copy does not hold as hard links."""
    if not may_link(files.folder, out):
        return [*files.files, *files_beside(files, _shapes(blocks))]
    return sorted({tensor.file.name for block in blocks for tensor in edited_places(files, names, block)})


def carried_bytes(folder: Path) -> int:
    """Return the size in bytes of configuration, tokenizer and other files of a folder without weights."""
    return sum(path.stat().st_size for path in carried_files(folder))


def save_edited(
    loaded: LoadedModel,
    edit: Edit,
    folder: Path,
    reverted: bool = False,
    quantised: str = PLAIN,
    force: bool = False,
    undo: bool = True,
) -> Saved:
    """Write a model with an edit, or with the edit reverted, into a folder that exists.

    Args:
        loaded: The model, with the edit applied. To revert the edit of a model in safetensors files, only its
            structure is used.
        edit: The edit.
        folder: The folder to write to.
        reverted: Whether to revert the edit, in the bytes of the files.
        quantised: How edited weights of a quantised model are written, "plain" or "keep".
        force: Whether the share of the update that survives with "keep" may be below its limit.
        undo: Whether to write the quantised tensors that are replaced, from which the edit can be reverted.

    Raises:
        InputError: The files are not those of the model, or there is too little free disk space.
        VerificationError: A weight to revert differs from the one after the edit.
        GuardError: An edited weight overflows the stored dtype.
        RocrError: Writing fails.
    """
    files = find_weights(loaded.source)
    if files is None:
        save_model(loaded, folder)
        written = find_weight_files(folder)
        return Saved(edit, [], {} if written is None else {"tensors": layout(written)})
    names = stored_names(files, loaded.model)
    edited = edited_weights(loaded.architecture, edit.updates)
    if quantised == PLAIN and not reverted:
        check_plain(names, [block for weight in edited for block in weight.blocks])
    if reverted and has_replaced(files.folder):
        return _restore(files, names, edit, edited, folder)
    changes: dict[str, Tensor] = {}
    weights, updates = [], []
    packed: list[Weight] = []
    requantised: list[WrittenQuantised] = []
    quantisation = find_quantisation(files.folder)
    for weight, update in zip(edited, edit.updates, strict=True):
        found = [find_quantised(names, block) for block in weight.blocks]
        first = next((place for place in found if place is not None), None)
        if first is not None:
            if reverted:
                raise InputError(f"{files.folder} lacks {REPLACED_FILE}, from which {first.weight.module} is restored.")
            assert quantisation is not None, "it has the weight"
            pairs = zip(found, weight.blocks, strict=True)
            mixed = [place or find_stored(files, names, block)[0] for place, block in pairs]
            done = edit_quantised(quantisation, weight, mixed, update, quantised)
            packed.append(weight)
            requantised.append(done)
            updates.append(replace(update, applied=done.applied))
            weights.append(written_quantised(weight, update, done))
            _add_unquantised(changes, files, names, weight, done)
            continue
        places = [find_stored(files, names, block) for block in weight.blocks]
        values, record = _without_edit(weight, update, places) if reverted else _with_edit(weight, update, places)
        _add_changes(changes, places, values)
        updates.append(update if reverted else replace(update, applied=record))
        weights.append(written_plain(weight, update, places, None if reverted else record))
    beside = files_beside(files, _shapes([block for weight in edited for block in weight.blocks]))
    replaced = None
    passed = check_surviving([done.report for done in requantised if not done.is_plain], force)
    if quantisation is not None and requantised:
        changes |= kept_parts(requantised)
        replaced = replacements(quantisation, files, names, loaded.model, packed, requantised)
        if undo:
            own = {place.weight.module: place.weight for done in requantised for place, _ in done.quantised}
            former = list(own.values()) if replaced is None else replaced_by(names, packed)
            save_replaced(files, former, replaced, folder / REPLACED_FILE)
    rewritten = rewrite_model(files, changes, folder, beside, replaced)
    kept = [name for name in [*files.files, *beside] if name not in rewritten]
    is_whole = all(parameter.device.type != "meta" for parameter in loaded.model.parameters())
    report = {
        "weights": [weight.to_json() for weight in weights],
        "tensors": _layout(files, folder, is_whole, replaced),
        "beside": beside,
        "left_out": other_weights(files.folder, [*files.files, *beside]),
        **report_of([done.report for done in requantised]),
    }
    linked = [name for name in kept if (folder / name).samefile(files.folder / name)]
    measured = replace(edit.report, limits_passed=[*edit.report.limits_passed, *passed])
    return Saved(replace(edit, updates=updates, report=measured), linked, report)


def holds_already(loaded: LoadedModel, edit: Edit) -> str | None:
    """Return the name of the first weight that has an edit applied in the files, or None.

    The loaded weight may have another dtype, in which the edit is not recognized.
    """
    files = find_weights(loaded.source)
    if files is None:
        return None
    names = stored_names(files, loaded.model)
    for weight, update in zip(edited_weights(loaded.architecture, edit.updates), edit.updates, strict=True):
        if update.applied is not None and update.applied.after == _digest(files, names, weight, update.applied):
            return weight.name
    return None


def _digest(files: WeightFiles, names: StoredNames, weight: Weight, applied: Applied) -> str:
    """Return the sha256 of the values of a stored weight; of a quantised one, in the dtype of a record."""
    return tensor_digest(*_stored_values(files, names, weight, applied))


def _stored_values(files: WeightFiles, names: StoredNames, weight: Weight, applied: Applied) -> list[Tensor]:
    """Return the stored values of the blocks of a weight; those of quantised ones in the dtype of a record."""
    values = []
    for block in weight.blocks:
        packed = find_quantised(names, block)
        if packed is None:
            values.append(find_stored(files, names, block)[0].read())
        else:
            values.append(packed.read().to(torch_dtype(applied.dtype.removeprefix("torch."))))
    return values


def _layout(files: WeightFiles, folder: Path, is_whole: bool, replaced: Replacements | None) -> dict[str, Any]:
    """Describe the tensors of an output for its report."""
    if replaced is not None and replaced.files:
        written = find_weight_files(folder)
        assert written is not None, "the output was written"
        files = written
    if is_whole:
        files.read_headers()
    return layout(files)


def _restore(files: WeightFiles, names: StoredNames, edit: Edit, edited: Sequence[Weight], folder: Path) -> Saved:
    """Write the files of a quantised model as they were before an edit; see `restore_replaced`."""
    restored_names = names_added(files.folder)
    changes: dict[str, Tensor] = {}
    for weight, update in zip(edited, edit.updates, strict=True):
        applied = update.applied
        if applied is None or applied.after != _digest(files, names, weight, applied):
            raise VerificationError(
                f"{weight.name} in {files.folder} is not the weight after this edit. Revert later edits "
                "first, or use the output of this edit."
            )
        found = [
            [] if find_quantised(names, block) is not None else find_stored(files, names, block)
            for block in weight.blocks
        ]
        unquantised = [bool(places) and places[0].tensor.name not in restored_names for places in found]
        if any(unquantised):
            values = _stored_values(files, names, weight, applied)
            undo_updates([with_values(weight, values)], [applied])
            rows = zip(found, values, unquantised, strict=True)
            for places, block_values in [row[:2] for row in rows if row[2]]:
                _add_changes(changes, [places], [block_values])
    rewritten = restore_replaced(files, folder, changes)
    restored_files = find_weight_files(folder)
    assert restored_files is not None, "the output was written"
    kept = [name for name in files.files if name not in rewritten]
    linked = [name for name in kept if (folder / name).samefile(files.folder / name)]
    report = {"weights": [], "tensors": layout(restored_files), "beside": [], "left_out": []}
    return Saved(edit, linked, report)


def _add_unquantised(
    changes: dict[str, Tensor], files: WeightFiles, names: StoredNames, weight: Weight, written: WrittenQuantised
) -> None:
    """Add the new values of the blocks of a mixture that are not quantised, such as those of a shared expert."""
    for block, done in zip(weight.blocks, written.blocks, strict=True):
        if isinstance(done.place, Place):
            _add_changes(changes, [find_stored(files, names, block)], [done.values])


def _with_edit(weight: Weight, update: LayerUpdate, places: Places) -> tuple[list[Tensor], Applied]:
    """Return the blocks to write: those of the model, or the stored ones with the update added and rounded once."""
    values, loaded = [block_places[0].read() for block_places in places], weight.stored
    applied = update.applied
    assert applied is not None, "the model has the edit applied"
    if tensor_digest(*(stored.to(weight.dtype) for stored in values)) != applied.before:
        raise InputError(
            f"{places[0][0].tensor.file} does not hold {weight.name} as it was before the edit. Use the files that the "
            "model was loaded from."
        )
    if values[0].dtype == weight.dtype:
        return loaded, applied
    record = apply_updates([with_values(weight, values)], [update.factors])[0]
    return values, record


def _without_edit(weight: Weight, update: LayerUpdate, places: Places) -> tuple[list[Tensor], Applied | None]:
    """Return the stored blocks with the edit reverted."""
    values = [block_places[0].read() for block_places in places]
    undo_updates([with_values(weight, values)], [update.applied])
    return values, update.applied


def _add_changes(changes: dict[str, Tensor], places: Places, values: Sequence[Tensor]) -> None:
    """Add the new values of blocks to those of the tensors that hold them."""
    for block_places, stored in zip(places, values, strict=True):
        for place in block_places:
            name = place.tensor.name
            if place.expert is None and not place.flipped:
                changes[name] = stored
                continue
            if name not in changes:
                changes[name] = place.tensor.read()
            place.write_to(changes[name], stored)


def _shapes(blocks: Sequence[Block]) -> set[tuple[int, ...]]:
    """Return the shapes in which the model stores the weights."""
    return {tuple(block.stored.shape) for block in blocks} | {tuple(block.parameter.shape) for block in blocks}
