"""Write an edited model to a folder: as its own files with the edited tensors replaced, or as new files if it has none.

All other tensors of the model's files keep their bytes. The edited ones keep their stored dtype, even if the model was
loaded in another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rocr.edit.apply import apply_updates, undo_updates
from rocr.edit.update import Applied, LayerUpdate
from rocr.edit.weight import Weight, edited_weights
from rocr.errors import InputError, VerificationError
from rocr.export.copying import REPLACED_FILE, carried_files, may_link, other_weights
from rocr.export.quantised import PLAIN, WrittenQuantised, check_surviving, edit_quantised, report_of
from rocr.export.replaced import (
    has_replaced,
    kept_parts,
    names_added,
    replacements,
    restore_replaced,
    save_replaced,
)
from rocr.export.replacing import Replacements
from rocr.export.rewrite import files_beside, rewrite_model
from rocr.io.disk_space import check_space
from rocr.io.dtypes import dtype_name, torch_dtype
from rocr.model.block import Block
from rocr.model.blocks import find_blocks
from rocr.model.fingerprint import tensor_digest
from rocr.model.load import LoadedModel, save_model, saved_bytes
from rocr.model.quantised.checkpoint import find_quantisation
from rocr.model.stored_weights import (
    Place,
    StoredNames,
    check_loaded,
    edited_places,
    find_stored,
    find_weights,
    layout,
    stored_names,
)
from rocr.model.weight_files import WeightFiles, find_weight_files

if TYPE_CHECKING:
    from rocr.edit.edit import Edit

Places = Sequence[Sequence[Place]]
"""For each block of a weight, where the files hold it."""


@dataclass(frozen=True)
class WrittenWeight:
    """An edited weight in the output.

    Attributes:
        layer: Index of the decoder layer.
        parameter: Name of the weight in the loaded model.
        stored: Names of the weight in the files.
        dtype: The stored dtype.
        loaded: The dtype in the loaded model. None if the weight was not loaded, to revert an edit.
        surviving: Share of the entries that the update changes after rounding to the stored dtype. None if the edit
            was reverted.
        parts: For each block of a mixture of experts, in the order of the update, where the files hold it. None for a
            dense layer.
    """

    layer: int
    parameter: str
    stored: list[str]
    dtype: str
    loaded: str | None
    surviving: float | None
    parts: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, without `parts` for a dense layer."""
        return {name: value for name, value in asdict(self).items() if name != "parts" or value is not None}


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


def check_output_possible(loaded: LoadedModel, layers: Sequence[int], out: Path) -> None:
    """Check, before a model is edited, that the result can be written.

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
    check_loaded(files, names, loaded.model, blocks)
    check_space(out, bytes_written(files, names, blocks, out))


def bytes_written(files: WeightFiles, names: StoredNames, blocks: Sequence[Block], out: Path | None) -> int:
    """Return the number of bytes that writing an edited copy of a folder takes on the disk."""
    anew = weights_copied(files, names, blocks, out)
    size = sum((files.folder / name).stat().st_size for name in anew) + carried_bytes(files.folder)
    return size + sum(replaced_bytes(names, block) for block in blocks)


def replaced_bytes(names: StoredNames, block: Block) -> int:
    """Return the most bytes that a quantised weight adds to an output: its plain values and its former parts."""
    weight = names.quantised.get(block.parameter_name)
    return 0 if weight is None else 4 * block.parameter.numel() + weight.size


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
    if reverted and has_replaced(files.folder):
        return _restore(files, names, edit, edited, folder)
    changes: dict[str, Tensor] = {}
    weights, updates = [], []
    requantised: list[WrittenQuantised] = []
    quantisation = find_quantisation(files.folder)
    for weight, update in zip(edited, edit.updates, strict=True):
        packed = names.quantised.get(weight.blocks[0].parameter_name)
        if packed is not None:
            if reverted:
                raise InputError(f"{files.folder} lacks {REPLACED_FILE}, from which {packed.module} is restored.")
            assert quantisation is not None, "it has the weight"
            done = edit_quantised(quantisation, packed, weight.blocks[0], update, quantised)
            requantised.append(done)
            updates.append(replace(update, applied=done.applied))
            weights.append(_written_quantised(weight.blocks[0], update, done))
            continue
        places = [find_stored(files, names, block) for block in weight.blocks]
        values, record = _without_edit(weight, update, places) if reverted else _with_edit(weight, update, places)
        _add_changes(changes, places, values)
        updates.append(update if reverted else replace(update, applied=record))
        weights.append(_written(weight, update, places, None if reverted else record))
    beside = files_beside(files, _shapes([block for weight in edited for block in weight.blocks]))
    replaced = None
    passed = check_surviving([done.report for done in requantised if done.parts is not None], force)
    if quantisation is not None and requantised:
        changes |= kept_parts(requantised)
        replaced = replacements(quantisation, files, names, loaded.model, requantised)
        if undo:
            save_replaced(files, requantised, replaced, folder / REPLACED_FILE)
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
    packed = names.quantised.get(weight.blocks[0].parameter_name)
    if packed is None:
        return tensor_digest(*(find_stored(files, names, block)[0].read() for block in weight.blocks))
    values = packed.read(tuple(weight.blocks[0].parameter.shape))
    return tensor_digest(values.to(torch_dtype(applied.dtype.removeprefix("torch."))))


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
        if weight.blocks[0].parameter_name not in names.quantised:
            places = [find_stored(files, names, block) for block in weight.blocks]
            if places[0][0].tensor.name not in restored_names:
                values, _ = _without_edit(weight, update, places)
                _add_changes(changes, places, values)
    rewritten = restore_replaced(files, folder, changes)
    restored = find_weight_files(folder)
    assert restored is not None, "the output was written"
    kept = [name for name in files.files if name not in rewritten]
    linked = [name for name in kept if (folder / name).samefile(files.folder / name)]
    report = {"weights": [], "tensors": layout(restored), "beside": [], "left_out": []}
    return Saved(edit, linked, report)


def _written_quantised(projection: Block, update: LayerUpdate, written: WrittenQuantised) -> WrittenWeight:
    """Return the entry of the report for an edited weight of a quantised model."""
    parts = written.weight.names
    return WrittenWeight(
        update.layer,
        update.parameter,
        [written.weight.name] if written.parts is None else sorted(parts.values()),
        dtype_name(written.values.dtype) if written.parts is None else written.weight.scheme.label,
        dtype_name(projection.parameter.dtype),
        written.applied.surviving,
    )


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
    record = apply_updates([_with_values(weight, values)], [update.factors])[0]
    return values, record


def _without_edit(weight: Weight, update: LayerUpdate, places: Places) -> tuple[list[Tensor], Applied | None]:
    """Return the stored blocks with the edit reverted."""
    values = [block_places[0].read() for block_places in places]
    undo_updates([_with_values(weight, values)], [update.applied])
    return values, update.applied


def _with_values(weight: Weight, values: Sequence[Tensor]) -> Weight:
    """Return a weight with other values, which are changed in place; the given one is not changed."""
    blocks = []
    for block, stored in zip(weight.blocks, values, strict=True):
        module = nn.Module()
        module.weight = nn.Parameter(stored, requires_grad=False)
        blocks.append(replace(block, module=module, attribute="weight", expert=None))
    return replace(weight, blocks=tuple(blocks))


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


def _written(weight: Weight, update: LayerUpdate, places: Places, record: Applied | None) -> WrittenWeight:
    """Return the entry of the report for a written weight."""
    block = weight.blocks[0]
    return WrittenWeight(
        update.layer,
        update.parameter,
        list(dict.fromkeys(place.tensor.name for block_places in places for place in block_places)),
        str(places[0][0].dtype).removeprefix("torch."),
        None if block.parameter.device.type == "meta" else dtype_name(block.parameter.dtype),
        None if record is None else record.surviving,
        [_part_entry(block_places[0]) for block_places in places] if weight.is_mixture else None,
    )


def _part_entry(place: Place) -> dict[str, Any]:
    return {"stored": place.tensor.name, "expert": place.expert, "experts": place.experts, "flipped": place.flipped}


def _shapes(blocks: Sequence[Block]) -> set[tuple[int, ...]]:
    """Return the shapes in which the model stores the weights."""
    return {tuple(block.stored.shape) for block in blocks} | {tuple(block.parameter.shape) for block in blocks}
