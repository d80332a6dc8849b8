"""Write an edited model as a copy of its GGUF file in which only the edited tensors differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rocr.edit.apply import apply_updates, bits
from rocr.edit.lora import thin_factors
from rocr.edit.stored import StoredWeight
from rocr.edit.update import Applied, LayerUpdate
from rocr.edit.weight import Weight, edited_weights
from rocr.errors import GuardError, InputError, VerificationError
from rocr.export.folder import Saved
from rocr.export.gguf_rewrite import NewTensor, grown_size, rewrite_gguf
from rocr.io.disk_space import check_space
from rocr.io.dtypes import dtype_name
from rocr.model.architecture import Block
from rocr.model.blocks import LayerBlocks, find_blocks
from rocr.model.fingerprint import tensor_digest
from rocr.model.gguf_layout import (
    PLAIN_KINDS,
    GgufLayout,
    GgufTensor,
    agrees,
    decode,
    encode,
    encode_changed,
    kind_to_write,
    read_gguf_layout,
    size_of,
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


def dense_blocks(layers: Iterable[LayerBlocks]) -> list[Block]:
    """Return the only block of each layer.

    Raises:
        InputError: A layer is a mixture of experts, which rocr does not write as GGUF.
    """
    found = list(layers)
    for layer in found:
        if layer.is_mixture:
            raise InputError(
                f"{layer.name} is a mixture of experts, whose tensors rocr does not write as GGUF. Write the edited "
                "model as a folder instead (--save model)."
            )
    return [layer.only for layer in found]


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
    for block in dense_blocks(find_blocks(loaded.architecture, layers).values()):
        tensor = layout.find(block.parameter_name, loaded.architecture.depth)
        if not agrees(block.weight, tensor, tensor.read()):
            raise _differs(block.parameter_name, tensor)
        kinds[tensor.name] = kind_to_write(tensor, kind)
        encode(torch.zeros(1, tensor.shape[-1]), kinds[tensor.name], tensor.name)
    check_space(out, grown_size(layout, kinds))


def gguf_bytes(source: ModelSource, blocks: Sequence[Block], depth: int, kind: str | None) -> int:
    """Return the size in bytes of a GGUF file with edited weights."""
    layout, tensors = _tensors(source, blocks, depth)
    return grown_size(layout, {tensor.name: kind_to_write(tensor, kind) for tensor in tensors})


def first_bytes(source: ModelSource, blocks: Sequence[Block], depth: int) -> int:
    """Return the size of the first bytes of edited tensors that an edit file holds, besides the undo data."""
    _, tensors = _tensors(source, blocks, depth)
    return sum(tensor.size for tensor in tensors if tensor.kind not in PLAIN_KINDS)


def _tensors(source: ModelSource, blocks: Sequence[Block], depth: int) -> tuple[GgufLayout, list[GgufTensor]]:
    layout = read_gguf_layout(gguf_path(source, "gguf"))
    return layout, [layout.find(block.parameter_name, depth) for block in blocks]


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
    for (block,), update in zip((weight.blocks for weight in weights), edit.updates, strict=True):
        tensor = layout.find(block.parameter_name, loaded.architecture.depth)
        after, error = update, None
        if reverted:
            changes[tensor.name] = _without_edit(block, update, tensor)
        else:
            changes[tensor.name], after, error = _with_edit(block, update, tensor, kind)
        updates.append(after)
        written.append(_written(block, after, tensor, changes[tensor.name].kind, error))
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
    return source.gguf is not None and all(record is not None and record.stored is not None for record in records)


def _with_edit(
    block: Block, update: LayerUpdate, tensor: GgufTensor, kind: str | None
) -> tuple[NewTensor, LayerUpdate, float]:
    """Return an edited tensor to write, the update with the record of it, and the relative error at the keys."""
    before = tensor.read()
    values = _edited_values(block, update, tensor, before)
    kind = kind_to_write(tensor, kind)
    data = encode_changed(values, tensor, kind)
    after = decode(data, kind, tensor.shape, tensor.name)
    if not torch.isfinite(after).all():
        raise GuardError(
            f"The edit makes {tensor.name} overflow {kind}. Nothing was written; choose another type with --gguf-type."
        )
    stored = tensor.read_bytes()
    record = StoredWeight(
        tensor.name, tensor.kind, kind, tensor_digest(stored), None if tensor.kind in PLAIN_KINDS else stored
    )
    unedited = _first_values(block, update, before)
    first, last = _as_parameter(block, unedited), _as_parameter(block, after)
    applied = Applied(
        str(last.dtype), tensor_digest(first), tensor_digest(last), bits(first).bitwise_xor(bits(last)), record
    )
    return NewTensor(kind, data), replace(update, applied=applied), _key_error(update, after - unedited)


def _edited_values(block: Block, update: LayerUpdate, tensor: GgufTensor, before: Tensor) -> Tensor:
    """Return the edited weight in float32: that of the model, or the stored one with the update added."""
    if not agrees(_weight(block, _unedited(block, update)), tensor, before):
        raise _differs(block.parameter_name, tensor)
    if block.parameter.dtype == torch.float32:
        return block.weight.detach().cpu().contiguous()
    values = before.clone()
    module = nn.Module()
    module.weight = nn.Parameter(values, requires_grad=False)
    apply_updates([Weight((replace(block, module=module, transposed=False),))], [update.factors])
    return values


def _first_values(block: Block, update: LayerUpdate, before: Tensor) -> Tensor:
    """Return the unedited weight in float32 as transformers gives it, since an edit is reverted in a loaded model."""
    if block.parameter.dtype != torch.float32:
        return before
    return _weight(block, _unedited(block, update))


def _unedited(block: Block, update: LayerUpdate) -> Tensor:
    """Return the loaded parameter as it was before the edit."""
    applied = update.applied
    assert applied is not None and applied.undo is not None, "the model has the edit applied"
    parameter = block.parameter.detach().cpu()
    return bits(parameter).bitwise_xor(applied.undo).view(parameter.dtype)


def _without_edit(block: Block, update: LayerUpdate, tensor: GgufTensor) -> NewTensor:
    """Return a tensor as it was before the edit."""
    applied = update.applied
    record = None if applied is None else applied.stored
    if applied is None or record is None:
        raise InputError(f"The edit has no record of {tensor.name} in a GGUF file, so it cannot be reverted there.")
    values = tensor.read()
    found = tensor_digest(_as_parameter(block, values))
    if tensor.kind != record.after or found != applied.after:
        raise VerificationError(
            f"{tensor.name} in {tensor.file} is not the tensor after this edit: it is {tensor.kind} with the sha256 "
            f"{found[:12]}, recorded is {record.after} with {applied.after[:12]}. Use the file that the edit was made "
            "for."
        )
    if record.data is not None:
        data = record.data
    elif record.before in PLAIN_KINDS and applied.undo is not None:
        first = bits(_as_parameter(block, values)).bitwise_xor(applied.undo).view(values.dtype)
        data = encode(_weight(block, first).contiguous(), record.before, tensor.name)
    else:
        raise InputError(
            f"The edit was saved without the undo data of {tensor.name}. Use a copy of the original model instead."
        )
    if tensor_digest(data) != record.sha256 or len(data) != size_of(tensor.shape, record.before):
        raise VerificationError(f"The undo data of {tensor.name} does not give its first bytes: the edit is damaged.")
    return NewTensor(record.before, data)


def _as_parameter(block: Block, values: Tensor) -> Tensor:
    """Return a weight (d_out, d_in) in the layout of the model's parameter."""
    return values.T.contiguous() if block.transposed else values


def _weight(block: Block, parameter: Tensor) -> Tensor:
    """Return a (d_out, d_in) view of values in the layout of the model's parameter."""
    return parameter.T if block.transposed else parameter


def _written(block: Block, update: LayerUpdate, tensor: GgufTensor, kind: str, error: float | None) -> WrittenTensor:
    """Return the entry of the report for a written tensor; without an error at the keys, the edit was reverted."""
    loaded = None if block.parameter.device.type == "meta" else dtype_name(block.parameter.dtype)
    surviving = None if error is None or update.applied is None else update.applied.surviving
    return WrittenTensor(update.layer, update.parameter, [tensor.name], kind, tensor.kind, loaded, surviving, error)


def _key_error(update: LayerUpdate, written: Tensor) -> float:
    """Return ‖(Δ' - Δ) Kᵀ‖ / ‖Δ Kᵀ‖ for the written update Δ' (d_out, d_in)."""
    keys = update.keys.cpu().double()
    left, right = thin_factors(update.factors)
    exact = left.double() @ (right.double() @ keys.T)
    return float((written.double() @ keys.T - exact).norm() / exact.norm().clamp(min=1e-300))


def _differs(parameter: str, tensor: GgufTensor) -> InputError:
    return InputError(
        f"{parameter} was loaded with other values than {tensor.name} in {tensor.file}, so an edited copy of the file "
        "cannot be written. Write the model as a folder instead (--save model)."
    )
