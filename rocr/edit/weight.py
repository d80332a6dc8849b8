"""The weight that one update changes: the block of a dense layer, or blocks of a mixture of experts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.edit.update import LayerUpdate, Part, parts_of
from rocr.errors import InputError
from rocr.model.architecture import Architecture
from rocr.model.block import Block
from rocr.model.blocks import column_slices, find_blocks
from rocr.model.fingerprint import tensor_digest
from rocr.model.tensor_parallel import own, own_part
from rocr.solve.factors import Factors


@dataclass(frozen=True)
class Weight:
    """The weight of an update (d_out, sum of d_in).

    Attributes:
        blocks: The blocks, in the order of the update's columns.
        is_mixture: Whether the blocks are some of a mixture of experts.
    """

    blocks: tuple[Block, ...]
    is_mixture: bool = False

    @property
    def name(self) -> str:
        """The name of the weight for messages."""
        if not self.is_mixture:
            return self.blocks[0].parameter_name
        return f"{self.blocks[0].label} and {len(self.blocks) - 1} more" if self.blocks[1:] else self.blocks[0].label

    @property
    def stored(self) -> list[Tensor]:
        """Views of the blocks as the model stores them."""
        return [block.stored for block in self.blocks]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.blocks[0].stored.dtype

    def digest(self) -> str:
        """Return the sha256 of the bytes of all blocks, each in row-major order."""
        return tensor_digest(*self.stored)

    def parts(self, update: Factors) -> list[tuple[Tensor, Tensor]]:
        """Return the factors left (d_out, r) and right (r, d_in) of each block's part of a product."""
        if not self.is_mixture:
            (block,) = self.blocks
            return [(update.left.to(block.weight.device), own_part(update.right, block.weight))]
        device = self.blocks[0].parameter.device
        left = update.left.to(device)
        places = column_slices(block.weight.shape[1] for block in self.blocks)
        return [(left, update.right[:, place].contiguous().to(device)) for place in places]

    @property
    def targets(self) -> list[Tensor]:
        """The (d_out, d_in) view of each block that this process changes."""
        return [own(block.weight) for block in self.blocks]


def _kind(is_mixture: bool) -> str:
    return "a mixture of experts" if is_mixture else "a dense layer"


def _is_named(block: Block, recorded: LayerUpdate | Part) -> bool:
    """Return whether a block has the recorded name, also in another class of the same checkpoint.

    A vision-language checkpoint can be loaded as the language model inside it, whose list of layers has another name.
    """
    if block.parameter_name in (recorded.parameter, recorded.own):
        return True
    (_, *mine), (_, *theirs) = (
        name.partition(f".{block.layer}.") for name in (block.parameter_name, recorded.parameter)
    )
    return bool(mine[0]) and mine == theirs


def _recorded_block(architecture: Architecture, update: LayerUpdate, part: Part) -> Block:
    """Return the block of a mixture that is not loaded by its recorded place.

    Raises:
        InputError: The model has no such parameter, or it has another shape.
    """
    layer, recorded = update.layer, part.parameter.partition(f".{update.layer}.")[2]
    name, _, attribute = f"{architecture.layers_name}.{layer}.{recorded}".rpartition(".")
    try:
        module = architecture.model.get_submodule(name)
        block = Block(layer, name, module, part.transposed, attribute, part.expert, part.experts)
        shape = tuple(block.weight.shape)
    except (AttributeError, AssertionError, RuntimeError, IndexError) as error:
        raise InputError(
            f"The edit changes {part.parameter} of expert {part.expert}, which this model does not have: {error}."
        ) from error
    if shape != (update.factors.shape[0], part.width):
        raise InputError(
            f"The edit changes {part.parameter} of expert {part.expert} {(update.factors.shape[0], part.width)}, but "
            f"this model's has {shape}."
        )
    return block


def edited_weights(architecture: Architecture, updates: Sequence[LayerUpdate]) -> list[Weight]:
    """Return the weights that updates belong to.

    Raises:
        InputError: The model has no such layer, or its blocks have other names or shapes.
    """
    layers = find_blocks(architecture, [update.layer for update in updates])
    found = []
    for update in updates:
        layer, expected = layers[update.layer], update.factors.shape
        if layer.is_mixture != bool(update.parts):
            raise InputError(
                f"The edit changes {update.parameter}, of {_kind(bool(update.parts))}, but layer {update.layer} of "
                f"this model is {_kind(layer.is_mixture)}."
            )
        if not layer.is_mixture:
            block = layer.only
            if not _is_named(block, update) or tuple(block.weight.shape) != expected:
                raise InputError(
                    f"The edit changes {update.parameter} {expected}, but layer {update.layer} of this model has "
                    f"{block.parameter_name} {tuple(block.weight.shape)}."
                )
            found.append(Weight((block,)))
            continue
        if layer.blocks[0].parameter.device.type == "meta":
            # The blocks of a mixture are found by running it, so those of one that is not loaded are the recorded ones.
            found.append(Weight(tuple(_recorded_block(architecture, update, part) for part in update.parts), True))
            continue
        fits = max(update.blocks) < len(layer.blocks)
        own_parts = parts_of(layer, update.blocks) if fits else ()
        for part, mine in zip(update.parts, own_parts or update.parts, strict=True):
            named = fits and _is_named(layer.blocks[part.block], part)
            if not named or (part.width, part.expert) != (mine.width, mine.expert):
                raise InputError(
                    f"The edit changes {part.parameter} of expert {part.expert} with {part.width} inputs, but block "
                    f"{part.block} of layer {update.layer} of this model is "
                    f"{layer.blocks[part.block].label if fits else 'missing'}."
                )
        blocks = tuple(layer.blocks[block] for block in update.blocks)
        if len(blocks[0].weight) != expected[0]:
            raise InputError(
                f"The edit changes {update.parameter} with {expected[0]} outputs, but this model's has "
                f"{len(blocks[0].weight)}."
            )
        found.append(Weight(blocks, is_mixture=True))
    return found
