"""The update of one layer, and the record of how it changed a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rocr.edit.stored import StoredWeight
from rocr.model.architecture import Block
from rocr.solve.factors import Factors
from rocr.solve.solve import Solution, System


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer, Δ = left @ right, and the system that it is the solution of.

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
        own: Name of the weight in the class that the checkpoint's config.json names, if the model was loaded as
            another class, such as the language model of a vision-language checkpoint. None if the name is the same.
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

    @classmethod
    def solved(cls, projection: Block, keys: Tensor, residuals: Tensor, solution: Solution) -> LayerUpdate:
        """Return the update of a down-projection that a solution gives, not applied yet."""
        return cls(
            projection.layer,
            projection.parameter_name,
            solution.factors,
            keys,
            residuals,
            projection.transposed,
            system=solution.system,
        )

    def after(self, applied: Applied) -> LayerUpdate:
        """Return the update with the record of its first application, to the weight that the keys were read with."""
        return replace(self, applied=applied, base=applied.before)


@dataclass(frozen=True)
class Applied:
    """The record of how an update changed a weight.

    Attributes:
        dtype: Dtype of the weight, such as "torch.bfloat16".
        before: sha256 of the weight's bytes before the update.
        after: sha256 of the weight's bytes after the update.
        undo: Exclusive or of the bits before and after, as integers on the CPU in the shape in which the model stores
            the parameter. None if it was not kept.
        stored: How a GGUF file stores the weight, if the edited model was written as one; dtype, before, after and
            undo are then those of the values that the file gives. None for other models.
    """

    dtype: str
    before: str
    after: str
    undo: Tensor | None
    stored: StoredWeight | None = None

    @property
    def surviving(self) -> float | None:
        """Share of the weight's entries that the update changed after rounding. None if `undo` was not kept."""
        return None if self.undo is None else float((self.undo != 0).double().mean())
