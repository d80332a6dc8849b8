"""The update of one layer, and the record of how it changed a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from rocr.edit.stored import StoredWeight
from rocr.errors import InputError
from rocr.io.json_values import flag_of, text_of, whole_number_of
from rocr.model.block import Block
from rocr.model.blocks import LayerBlocks, arranged, column_slices
from rocr.solve.factors import Factors
from rocr.solve.solve import RetainedRows, Solution, System


@dataclass(frozen=True)
class Part:
    """The columns of a wide update that belong to one block of a mixture of experts.

    Attributes:
        block: Index of the block in its layer.
        parameter: Name of the parameter in the model's state dict.
        width: Number of the block's inputs d_in, and of the columns.
        transposed: Whether the model stores the block's weight as (d_in, d_out).
        expert: Index of the expert in the parameter. None if the parameter holds this block only.
        experts: Number of experts in the parameter.
        declared_transposed: Whether the module has the attribute `is_transposed`, by which PEFT reads the parameter.
        stacked: Whether the parameter is one matrix, whose rows are those of all experts.
        own: As `LayerUpdate.own`.
    """

    block: int
    parameter: str
    width: int
    transposed: bool = False
    expert: int | None = None
    experts: int = 1
    declared_transposed: bool = False
    stacked: bool = False
    own: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Part:
        """Return the inverse of `to_json`.

        Raises:
            TypeError, ValueError: A field is missing, unknown or has another type.
        """
        part = cls(**values)
        for name in ("block", "width", "experts"):
            whole_number_of(getattr(part, name), name)
        if part.expert is not None and whole_number_of(part.expert, "expert") >= part.experts:
            raise ValueError(f"a part is of expert {part.expert} of {part.experts}")
        text_of(part.parameter, "parameter")
        if part.own is not None:
            text_of(part.own, "own")
        flag_of(part.transposed, "transposed")
        flag_of(part.declared_transposed, "declared_transposed")
        flag_of(part.stacked, "stacked")
        return part


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer, Δ = left @ right, and the system that it is the solution of.

    The update of a mixture of experts is wide: its keys, and the columns of Δ, are those of the touched blocks side by
    side.

    Attributes:
        layer: Index of the decoder layer.
        parameter: Name of the weight of its down-projection in the model's state dict.
        factors: left (d_out, n) and right (n, d_in) float32; Δ itself if there are more keys than inputs.
        keys: (n, d_in) float32.
        residuals: (n, d_out) float32.
        transposed: Whether the model stores the weight as (d_in, d_out), as GPT-2 does.
        applied: Record of the change of a weight. None before the update is applied.
        system: What the update can be solved from again with other keys. None if it was not kept.
        base: sha256 of the weight that keys and residuals were measured with. None if it was not kept.
        parts: The blocks of a mixture that the update changes, in the order of the columns. Empty for a dense layer.
        own: Name of the weight in the other class that its checkpoint can be loaded as, such as the language model of
            a vision-language checkpoint; see `rocr.model.own_names`. None if there is none or the name is the same.
    """

    layer: int
    parameter: str
    factors: Factors
    keys: Tensor
    residuals: Tensor
    transposed: bool = False
    applied: Applied | None = None
    system: System | None = None
    base: str | None = None
    own: str | None = None
    parts: tuple[Part, ...] = ()

    @classmethod
    def solved(
        cls, layer: LayerBlocks, touched: Sequence[int], keys: Tensor, residuals: Tensor, solution: Solution
    ) -> LayerUpdate:
        """Return the update of a layer that a solution gives, not applied yet.

        Args:
            layer: The blocks of the layer.
            touched: Indices of the blocks that the keys cover.
            keys: (n, sum of d_in over the touched blocks).
            residuals: (n, d_out).
            solution: The solution.
        """
        first = layer.blocks[touched[0]]
        return cls(
            layer.layer,
            first.parameter_name,
            solution.factors,
            keys,
            residuals,
            first.transposed,
            system=solution.system,
            parts=parts_of(layer, touched) if layer.is_mixture else (),
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks of the layer that the update changes."""
        return tuple(part.block for part in self.parts) or (0,)

    @property
    def columns(self) -> list[slice]:
        """The columns of each part in the wide update."""
        return column_slices(part.width for part in self.parts)

    @property
    def left(self) -> Tensor:
        """The left factor of Δ, (d_out, n) float32; see `rocr.solve.factors.Factors`."""
        return self.factors.left

    @property
    def right(self) -> Tensor:
        """The right factor of Δ, (n, d_in) float32."""
        return self.factors.right

    def after(self, applied: Applied) -> LayerUpdate:
        """Return the update with the record of its first application, to the weight that the keys were read with."""
        return replace(self, applied=applied, base=applied.before)


def parts_of(layer: LayerBlocks, touched: Sequence[int]) -> tuple[Part, ...]:
    """Return the parts of an update of some blocks of a mixture."""
    return tuple(_part(i, layer.blocks[i]) for i in touched)


def _part(index: int, block: Block) -> Part:
    declared = block.parameter.ndim == 3 and bool(getattr(block.module, "is_transposed", False))
    stacked = block.experts > 1 and block.parameter.ndim == 2
    return Part(
        index,
        block.parameter_name,
        block.weight.shape[1],
        block.transposed,
        block.expert,
        block.experts,
        declared,
        stacked,
    )


@dataclass(frozen=True)
class Applied:
    """The record of how an update changed a weight.

    Attributes:
        dtype: Dtype of the weight, such as "torch.bfloat16".
        before: sha256 of the weight's bytes before the update; of several blocks, those of all of them in order.
        after: sha256 of the weight's bytes after the update.
        undo: Exclusive or of the bits before and after, as integers on the CPU in the shape in which the model stores
            the parameter; of several blocks, those of all of them in order, flat. None if it was not kept.
        stored: How a GGUF file stores the weight, if the edited model was written as one; dtype, before, after and
            undo are then those of the values that the file gives. One record; for a mixture, one for each tensor, in
            the order of their first blocks. Empty for other models.
    """

    dtype: str
    before: str
    after: str
    undo: Tensor | None
    stored: tuple[StoredWeight, ...] = ()

    @property
    def surviving(self) -> float | None:
        """Share of the weight's entries that the update changed after rounding. None if `undo` was not kept."""
        return None if self.undo is None else float((self.undo != 0).double().mean())


def with_same_parts(mine: LayerUpdate, theirs: LayerUpdate) -> tuple[LayerUpdate, LayerUpdate]:
    """Return two updates of one layer with the blocks of both; the added columns are zero."""
    if not mine.parts or mine.blocks == theirs.blocks:
        return mine, theirs
    if mine.factors.support is not None or theirs.factors.support is not None:
        raise InputError(
            f"The edits keep the zeros of different experts of layer {mine.layer}, and neither holds where the zeros "
            "of the other's experts are: add the concepts of one to the other instead (Edit.add, rocr add)."
        )
    parts = {part.block: part for part in (*mine.parts, *theirs.parts)}
    union = tuple(parts[block] for block in sorted(parts))
    return _with_parts(mine, union), _with_parts(theirs, union)


def _with_parts(update: LayerUpdate, parts: tuple[Part, ...]) -> LayerUpdate:
    held, wanted = ({part.block: part.width for part in each} for each in (update.parts, parts))
    system = update.system
    if system is not None and system.product is not None:
        system = replace(system, product=arranged(system.product, held, wanted))
    if system is not None and system.retained is not None:
        retained = system.retained
        products = None if retained.product is None else arranged(retained.product, held, wanted)
        system = replace(system, retained=RetainedRows(arranged(retained.keys, held, wanted), products))
    factors = Factors(update.left, arranged(update.right, held, wanted))
    return replace(
        update, parts=parts, keys=arranged(update.keys, held, wanted), factors=factors, system=system, applied=None
    )
