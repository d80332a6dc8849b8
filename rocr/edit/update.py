"""The update of one layer, and the record of what it did to a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rocr.model.architecture import DownProjection
from rocr.solve.factors import Factors
from rocr.solve.solve import Solution, System


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer, Δ = left @ right, and what it was solved from.

    Attributes:
        layer: the decoder layer.
        parameter: name of its down-projection's weight in the model's state dict.
        factors: left (d_out, n) and right (n, d_in) float32; Δ itself where there are more keys than inputs.
        keys: (n, d_in) float32.
        residuals: (n, d_out) float32.
        transposed: whether the model stores the weight as (d_in, d_out), as GPT-2 does.
        applied: what it did to a weight; None before it is applied.
        system: what it can be solved from again with other keys; None where that was not kept.
        base: sha256 of the weight that keys and residuals were measured with; None where that was not kept.
        own: name of the weight in the class that the checkpoint's config.json names, where the model was loaded as
            another class, as the language model of a vision-language checkpoint is; None: the same name.
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
    def solved(cls, projection: DownProjection, keys: Tensor, residuals: Tensor, solution: Solution) -> LayerUpdate:
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
        """Return the update with the record of what it did to the weight that keys and residuals were read with."""
        return replace(self, applied=applied, base=applied.before)


@dataclass(frozen=True)
class Applied:
    """What an update did to a weight.

    Attributes:
        dtype: of the weight, such as "torch.bfloat16".
        before: sha256 of the weight's bytes before the update.
        after: sha256 of the weight's bytes after it.
        undo: exclusive or of the bits before and after, in the parameter's own shape, as integers on the CPU;
            None where it was not kept.
    """

    dtype: str
    before: str
    after: str
    undo: Tensor | None
