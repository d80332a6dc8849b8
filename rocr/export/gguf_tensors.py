"""The tensors of a GGUF file that one update changes: their values before and after it, and their first bytes.

A tensor holds one weight, or those of all experts of a layer. An update of a mixture changes some of the experts in one
tensor, and shared experts in others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rocr.edit.apply import apply_updates, bits
from rocr.edit.stored import StoredWeight
from rocr.edit.update import LayerUpdate
from rocr.edit.weight import Weight
from rocr.errors import InputError, VerificationError
from rocr.model.block import Block
from rocr.model.fingerprint import tensor_digest
from rocr.model.gguf_layout import PLAIN_KINDS, GgufLayout, GgufTensor, agrees, encode, size_of


@dataclass(frozen=True)
class EditedTensor:
    """A tensor of a GGUF file that an update changes.

    Attributes:
        tensor: The tensor.
        blocks: The changed blocks that it holds, in the order of the experts.
        places: The place of each of them among all blocks of the update.
    """

    tensor: GgufTensor
    blocks: tuple[Block, ...]
    places: tuple[int, ...]

    @property
    def holds_experts(self) -> bool:
        """Whether the tensor holds the weights of several experts."""
        return self.blocks[0].expert is not None

    def of(self, values: Tensor, block: Block) -> Tensor:
        """Return the view (d_out, d_in) of a block in values of the tensor."""
        return values if block.expert is None else values[block.expert]

    def differs(self) -> InputError:
        """Return the error of a tensor with other values than the loaded ones."""
        return InputError(
            f"{self.blocks[0].parameter_name} was loaded with other values than {self.tensor.name} in "
            f"{self.tensor.file}, so an edited copy of the file cannot be written. Write the model as a folder instead "
            "(--save model)."
        )


def edited_tensors(layout: GgufLayout, blocks: Sequence[Block], depth: int) -> list[EditedTensor]:
    """Return the tensors that hold blocks, in the order of their first blocks.

    Args:
        layout: The file.
        blocks: The blocks of a layer, or some of them.
        depth: Number of decoder layers of the model.

    Raises:
        InputError: The file holds no tensor of a block; see `GgufLayout.find`.
    """
    places: dict[str, list[int]] = {}
    for i, block in enumerate(blocks):
        places.setdefault(block.parameter_name, []).append(i)
    found = []
    for parameter, own in places.items():
        tensor = layout.find(parameter, depth)
        own.sort(key=lambda i: blocks[i].expert or 0)
        held = EditedTensor(tensor, tuple(blocks[i] for i in own), tuple(own))
        first = held.blocks[0]
        expected = tuple(first.weight.shape) if first.expert is None else (first.experts, *first.weight.shape)
        if tensor.shape != expected:
            raise held.differs()
        found.append(held)
    return found


def as_parameter(block: Block, values: Tensor) -> Tensor:
    """Return a weight (d_out, d_in) in the layout of the model's parameter."""
    return values.T.contiguous() if block.transposed else values.contiguous()


def as_weight(block: Block, parameter: Tensor) -> Tensor:
    """Return a (d_out, d_in) view of values in the layout of the model's parameter."""
    return parameter.T if block.transposed else parameter


def values_before(held: EditedTensor, undos: Sequence[Tensor]) -> list[Tensor]:
    """Return the weight (d_out, d_in) of each block before the edit in float32, as transformers gives it.

    Args:
        held: The tensor. The model has the edit applied.
        undos: The undo data of all blocks of the update.

    Raises:
        InputError: The file holds other values.
    """
    stored, found = held.tensor.read(), []
    for block, place in zip(held.blocks, held.places, strict=True):
        loaded = block.stored.detach().cpu()
        first = as_weight(block, bits(loaded).bitwise_xor(undos[place]).view(loaded.dtype))
        if not agrees(first, held.tensor, held.of(stored, block)):
            raise held.differs()
        # An edit is reverted in a loaded model, so the values before it are those that a model has.
        found.append(first if loaded.dtype == torch.float32 else held.of(stored, block))
    return found


def values_after(held: Sequence[EditedTensor], update: LayerUpdate) -> list[Tensor]:
    """Return the edited values of each tensor in float32: those of the model, or the stored ones with the update."""
    found = [each.tensor.read() for each in held]
    blocks: dict[int, Block] = {}
    for each, values in zip(held, found, strict=True):
        module = nn.Module()
        module.weight = nn.Parameter(values, requires_grad=False)
        for block, place in zip(each.blocks, each.places, strict=True):
            if block.stored.dtype == torch.float32:
                each.of(values, block).copy_(block.weight.detach())
            else:
                blocks[place] = replace(block, module=module, attribute="weight", transposed=False)
    if blocks:
        weight = Weight(tuple(blocks[place] for place in sorted(blocks)), bool(update.parts))
        apply_updates([weight], [update.factors])
    return found


def record_of(held: EditedTensor, kind: str) -> StoredWeight:
    """Return the record of a tensor that is written in a type, with the first bytes that the values do not give."""
    tensor = held.tensor
    stored = tensor.read_bytes()
    digest = tensor_digest(stored)
    kept: Tensor | None = stored
    if held.holds_experts and kind == tensor.kind:
        parts = stored.reshape(tensor.shape[0], -1)
        kept = parts[[block.expert for block in held.blocks]].reshape(-1) if kind not in PLAIN_KINDS else None
    elif not held.holds_experts and tensor.kind in PLAIN_KINDS:
        kept = None
    return StoredWeight(tensor.name, tensor.kind, kind, digest, kept)


def first_bytes_of(held: EditedTensor, record: StoredWeight, undos: Sequence[Tensor | None]) -> Tensor:
    """Return the bytes that a tensor had before the edit.

    Args:
        held: The tensor, after the edit.
        record: Its record.
        undos: The undo data of all blocks of the update.

    Raises:
        InputError: The undo data was not kept.
        VerificationError: The undo data does not give the bytes of the record.
    """
    tensor, size = held.tensor, size_of(held.tensor.shape, record.before)
    damaged = VerificationError(f"The undo data of {tensor.name} does not give its first bytes: the edit is damaged.")
    if record.data is not None and not (held.holds_experts and record.before == record.after):
        data = record.data
    else:
        data = tensor.read_bytes() if held.holds_experts else torch.empty(size, dtype=torch.uint8)
        parts = data.reshape(tensor.shape[0] if held.holds_experts else 1, -1)
        kept = record.data
        pieces = _from_undo(held, record, undos) if kept is None else kept.tensor_split(len(held.blocks))
        if any(len(piece) != parts.shape[1] for piece in pieces):
            raise damaged
        for block, piece in zip(held.blocks, pieces, strict=True):
            parts[block.expert or 0] = piece
    if tensor_digest(data) != record.sha256 or len(data) != size:
        raise damaged
    return data


def _from_undo(held: EditedTensor, record: StoredWeight, undos: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the bytes of each block before the edit from the undo data of its values."""
    name = held.tensor.name
    is_whole = not held.holds_experts or record.before == record.after
    found, values = [], held.tensor.read()
    for block, place in zip(held.blocks, held.places, strict=True):
        undo = undos[place]
        if undo is None or record.before not in PLAIN_KINDS or not is_whole:
            raise InputError(
                f"The edit was saved without the undo data of {name}. Use a copy of the original model instead."
            )
        now = as_parameter(block, held.of(values, block))
        first = bits(now).bitwise_xor(undo).view(now.dtype)
        found.append(encode(as_weight(block, first).contiguous(), record.before, name))
    return found
