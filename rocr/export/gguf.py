"""Write an edited model as a copy of its GGUF file in which only the edited tensors differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rocr.edit.apply import applied_of, split_undo
from rocr.edit.update import LayerUpdate
from rocr.edit.weight import Weight, edited_weights
from rocr.errors import GuardError, InputError, VerificationError
from rocr.export.folder import Saved
from rocr.export.gguf_rewrite import NewTensor, grown_size, rewrite_gguf
from rocr.export.gguf_tensors import (
    EditedTensor,
    as_parameter,
    edited_tensors,
    first_bytes_of,
    record_of,
    values_after,
    values_before,
)
from rocr.io.disk_space import check_space
from rocr.io.dtypes import dtype_name
from rocr.model.block import Block
from rocr.model.blocks import find_blocks
from rocr.model.fingerprint import tensor_digest
from rocr.model.gguf_layout import (
    PLAIN_KINDS,
    GgufLayout,
    agrees,
    decode,
    encode,
    encode_changed,
    kind_to_write,
    read_gguf_layout,
)
from rocr.model.load import LoadedModel
from rocr.model.source import ADAPTER_GGUF, ModelSource

if TYPE_CHECKING:
    from rocr.edit.edit import Edit


@dataclass(frozen=True)
class WrittenTensor:
    """An edited tensor in a GGUF file.

    Attributes:
        layer: Index of the decoder layer.
        parameter: Name of the weight in the loaded model.
        stored: Name of the tensor in the file, in a list.
        dtype: Name of its type in the output, such as "Q8_0".
        was: Name of its type in the input.
        loaded: The dtype in the loaded model. None if the weight was not loaded, to revert an edit.
        surviving: Share of the entries that the edit changes after rounding to the type. None if the edit was reverted.
        key_error: ‖(Δ' - Δ) Kᵀ‖ / ‖Δ Kᵀ‖ of the written update Δ', the relative error at the concepts' keys. None if
            the edit was reverted.
    """

    layer: int
    parameter: str
    stored: list[str]
    dtype: str
    was: str
    loaded: str | None
    surviving: float | None
    key_error: float | None


def gguf_path(source: ModelSource, what: str) -> Path:
    """Return the path of the GGUF file that a model comes from.

    Raises:
        InputError: The model comes from something else.
    """
    if source.folder is None or source.gguf is None:
        raise InputError(
            f"--save {what} needs a model in a .gguf file, since its metadata and names are those of that file, and "
            f"{source.name} is none."
        )
    if source.gguf == ADAPTER_GGUF:
        raise InputError(f"{source.name} has the name that rocr gives to adapters: rename it.")
    return source.folder / source.gguf


def check_gguf_possible(loaded: LoadedModel, layers: Sequence[int], out: Path, kind: str | None) -> None:
    """Check, before a model is edited, that a GGUF file with the result can be written.

    Args:
        loaded: The model, not edited yet.
        layers: The layers to edit.
        out: The output.
        kind: The type of edited tensors. None keeps the type of each if it can be written.

    Raises:
        InputError: The file is damaged or split, holds other values than the loaded ones, an edited weight cannot be
            stored in the type, or there is too little free disk space.
    """
    layout = read_gguf_layout(gguf_path(loaded.source, "gguf"))
    kinds = {}
    for layer in find_blocks(loaded.architecture, layers).values():
        for held in edited_tensors(layout, layer.blocks, loaded.architecture.depth):
            tensor, stored = held.tensor, held.tensor.read()
            if not all(agrees(block.weight, tensor, held.of(stored, block)) for block in held.blocks):
                raise held.differs()
            kinds[tensor.name] = kind_to_write(tensor, kind)
            encode(torch.zeros(1, tensor.shape[-1]), kinds[tensor.name], tensor.name)
    check_space(out, grown_size(layout, kinds))


def edited_kinds(source: ModelSource, blocks: Sequence[Block], depth: int) -> set[str]:
    """Return the types of the tensors that hold blocks in the .gguf file of a model of `depth` layers."""
    return {each.tensor.kind for each in _tensors(source, blocks, depth)[1]}


def gguf_bytes(source: ModelSource, blocks: Sequence[Block], depth: int, kind: str | None) -> int:
    """Return the size in bytes of a GGUF file with edited weights."""
    layout, tensors = _tensors(source, blocks, depth)
    return grown_size(layout, {held.tensor.name: kind_to_write(held.tensor, kind) for held in tensors})


def first_bytes(source: ModelSource, blocks: Sequence[Block], depth: int, kind: str | None) -> int:
    """Return the size of the first bytes of edited tensors that an edit file holds, besides the undo data.

    Of experts, at most: those of experts that stay as they are may be left out.
    """
    _, tensors = _tensors(source, blocks, depth)
    return sum(
        held.tensor.size
        for held in tensors
        if held.tensor.kind not in PLAIN_KINDS
        or (held.holds_experts and kind_to_write(held.tensor, kind) != held.tensor.kind)
    )


def _tensors(source: ModelSource, blocks: Sequence[Block], depth: int) -> tuple[GgufLayout, list[EditedTensor]]:
    layout = read_gguf_layout(gguf_path(source, "gguf"))
    return layout, edited_tensors(layout, blocks, depth)


def save_edited_gguf(
    loaded: LoadedModel, edit: Edit, folder: Path, reverted: bool = False, kind: str | None = None
) -> Saved:
    """Write a GGUF file with an edit, or with the edit reverted, into a folder that exists.

    Args:
        loaded: The model, with the edit applied. To revert the edit, only its structure is used.
        edit: The edit.
        folder: The folder to write to. The file has the name of the model's file.
        reverted: Whether to revert the edit, in the bytes of the file.
        kind: The type of edited tensors. None keeps the type of each if it can be written.

    Raises:
        InputError: The file is not that of the model, or there is too little free disk space.
        VerificationError: A tensor to revert differs from the one after the edit.
        GuardError: An edited weight overflows the type.
        RocrError: Writing fails.
    """
    path = gguf_path(loaded.source, "gguf")
    layout = read_gguf_layout(path)
    changes: dict[str, NewTensor] = {}
    written, updates = [], []
    weights = edited_weights(loaded.architecture, edit.updates)
    for weight, update in zip(weights, edit.updates, strict=True):
        tensors, after, error = edited_tensors(layout, weight.blocks, loaded.architecture.depth), update, None
        if reverted:
            data = _without_edit(weight, update, tensors)
        else:
            data, after, error = _with_edit(weight, update, tensors, kind)
        updates.append(after)
        changes |= {held.tensor.name: new for held, new in zip(tensors, data, strict=True)}
        written += [_written(held, after, weight, new.kind, error) for held, new in zip(tensors, data, strict=True)]
    check_space(folder, grown_size(layout, {name: change.kind for name, change in changes.items()}))
    out = folder / path.name
    rewrite_gguf(layout, changes, out)
    sizes = {"before": path.stat().st_size, "after": out.stat().st_size}
    described = {"file": path.name, "bytes": sizes, "tensors": read_gguf_layout(out).describe()}
    return Saved(
        replace(edit, updates=updates), [], {"weights": [asdict(weight) for weight in written], "gguf": described}
    )


def reverts_in_file(source: ModelSource, edit: Edit) -> bool:
    """Return whether an edit of a model in a GGUF file can be reverted in the bytes of the file."""
    records = [update.applied for update in edit.updates]
    return source.gguf is not None and all(record is not None and record.stored for record in records)


def _with_edit(
    weight: Weight, update: LayerUpdate, tensors: Sequence[EditedTensor], chosen: str | None
) -> tuple[list[NewTensor], LayerUpdate, float]:
    """Return the edited tensors to write, the update with the record of them, and the relative error at the keys."""
    assert update.applied is not None and update.applied.undo is not None, "the model has the edit applied"
    undos = split_undo(weight, update.applied.undo)
    firsts: dict[int, Tensor] = {}
    lasts: dict[int, Tensor] = {}
    written, records = [], []
    for held in tensors:
        firsts |= dict(zip(held.places, values_before(held, undos), strict=True))
    for held, values in zip(tensors, values_after(tensors, update), strict=True):
        tensor, kind = held.tensor, kind_to_write(held.tensor, chosen)
        data = encode_changed(values, tensor, kind)
        after = decode(data, kind, tensor.shape, tensor.name)
        if not torch.isfinite(after).all():
            raise GuardError(
                f"The edit makes {tensor.name} overflow {kind}. Nothing was written; choose another type with "
                "--gguf-type."
            )
        lasts |= {place: held.of(after, block) for block, place in zip(held.blocks, held.places, strict=True)}
        written.append(NewTensor(kind, data))
        records.append(record_of(held, kind))
    places = range(len(weight.blocks))
    before, after_edit = (
        [as_parameter(weight.blocks[place], values[place]) for place in places] for values in (firsts, lasts)
    )
    applied = applied_of(before, after_edit, weight.is_mixture)
    update = replace(update, applied=replace(applied, stored=tuple(records)))
    change = torch.cat([lasts[place] - firsts[place] for place in places], dim=1)
    return written, update, _key_error(update, change)


def _without_edit(weight: Weight, update: LayerUpdate, tensors: Sequence[EditedTensor]) -> list[NewTensor]:
    """Return the tensors as they were before the edit."""
    applied, names = update.applied, [held.tensor.name for held in tensors]
    if applied is None or [record.tensor for record in applied.stored] != names:
        raise InputError(
            f"The edit has no record of {', '.join(names)} in a GGUF file, so it cannot be reverted there."
        )
    values: dict[int, Tensor] = {}
    for held in tensors:
        stored = held.tensor.read()
        values |= {place: held.of(stored, block) for block, place in zip(held.blocks, held.places, strict=True)}
    found = tensor_digest(*(as_parameter(block, values[place]) for place, block in enumerate(weight.blocks)))
    for held, record in zip(tensors, applied.stored, strict=True):
        tensor = held.tensor
        if tensor.kind != record.after or found != applied.after:
            raise VerificationError(
                f"{tensor.name} in {tensor.file} is not the tensor after this edit: it is {tensor.kind} with the "
                f"sha256 {found[:12]}, recorded is {record.after} with {applied.after[:12]}. Use the file that the "
                "edit was made for."
            )
    undos = [None] * len(weight.blocks) if applied.undo is None else split_undo(weight, applied.undo)
    return [
        NewTensor(record.before, first_bytes_of(held, record, undos))
        for held, record in zip(tensors, applied.stored, strict=True)
    ]


def _written(held: EditedTensor, update: LayerUpdate, weight: Weight, kind: str, error: float | None) -> WrittenTensor:
    """Return the entry of the report for a written tensor; without an error at the keys, the edit was reverted."""
    block, surviving = held.blocks[0], None
    loaded = None if block.parameter.device.type == "meta" else dtype_name(block.parameter.dtype)
    if error is not None and update.applied is not None and update.applied.undo is not None:
        undos = split_undo(weight, update.applied.undo)
        surviving = float(torch.cat([undos[place].reshape(-1) != 0 for place in held.places]).double().mean())
    name = block.parameter_name if weight.is_mixture else update.parameter
    return WrittenTensor(update.layer, name, [held.tensor.name], kind, held.tensor.kind, loaded, surviving, error)


def _key_error(update: LayerUpdate, written: Tensor) -> float:
    """Return ‖(Δ' - Δ) Kᵀ‖ / ‖Δ Kᵀ‖ for the written update Δ' (d_out, sum of d_in)."""
    keys = update.keys.cpu().double()
    exact = update.factors.moves(keys).T
    return float((written.double() @ keys.T - exact).norm() / exact.norm().clamp(min=1e-300))
