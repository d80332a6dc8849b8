"""Put updates onto a model's weights, and take them off again to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rocr import ops
from rocr.errors import GuardError, InputError, VerificationError
from rocr.model.architecture import Architecture, DownProjection
from rocr.model.fingerprint import tensor_digest
from rocr.model.tensor_parallel import own, own_part, whole
from rocr.ops.arithmetic import plain_arithmetic, writing
from rocr.solve.factors import Factors
from rocr.solve.solve import System

Result = TypeVar("Result")
BLOCK_ELEMENTS = 1 << 24
"""Numbers of a weight that are held in float32 at a time (64 MiB)."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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

    @property
    def left(self) -> Tensor:
        """(d_out, r) float32."""
        return self.factors.left

    @property
    def right(self) -> Tensor:
        """(r, d_in) float32."""
        return self.factors.right


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


def apply_updates(
    projections: Sequence[DownProjection],
    updates: Sequence[Factors],
    keep: Callable[[list[Applied]], object] = list,
) -> list[Applied]:
    """Add an update to each weight in place, with one rounding.

    Args:
        projections: the down-projections to change.
        updates: one for each.
        keep: gets the records before this function returns: an interruption behind that may lose what is returned.

    Raises:
        GuardError: a weight would not be finite. On any exception all are left as they were.
    """
    parameters = [projection.parameter.data for projection in projections]
    before = [parameter.clone() for parameter in parameters]
    try:
        pairs = list(zip(projections, updates, strict=True))
        thin = [(projection, update) for projection, update in pairs if update.matrix is None]
        ops.low_rank_update(
            [own(projection.weight) for projection, _ in thin],
            [update.left.to(projection.weight.device) for projection, update in thin],
            [own_part(update.right, projection.weight) for projection, update in thin],
        )
        for projection, update in pairs:
            if update.matrix is not None:
                _add(own(projection.weight), own_part(update.matrix, projection.weight))
        applied = [_applied(*each) for each in zip(projections, before, strict=True)]
        keep(applied)
        return applied
    except BaseException:
        with writing(*parameters):
            for parameter, original in zip(parameters, before, strict=True):
                parameter.copy_(original)
        raise


def _add(weight: Tensor, update: Tensor) -> None:
    """Add a float32 matrix to a weight (d_out, d_in), in blocks of rows, each rounded once to the weight's dtype."""
    rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        block.copy_(block.float() + update[start : start + rows])


def undo_updates(projections: Sequence[DownProjection], applied: Sequence[Applied | None]) -> None:
    """Give weights back the bits they had before their updates.

    Raises:
        VerificationError: a weight is not as the update left it; nothing is changed.
        InputError: the bits were not kept; nothing is changed.
    """
    undos = [_checked_undo(projection, record) for projection, record in zip(projections, applied, strict=True)]
    for projection, undo in zip(projections, undos, strict=True):
        _flip(projection.parameter.data, undo)


def holds_updates(projections: Sequence[DownProjection], applied: Sequence[Applied | None]) -> bool:
    """Whether weights are as their updates left them; False where all are as they were before.

    Raises:
        VerificationError: they are neither.
    """
    if all(record is None for record in applied):
        return False
    found = [tensor_digest(projection.parameter.data) for projection in projections]
    for state, name in ((True, "after"), (False, "before")):
        if all(r is not None and digest == getattr(r, name) for digest, r in zip(found, applied, strict=True)):
            return state
    raise VerificationError(
        f"{', '.join(projection.parameter_name for projection in projections)} are neither as this edit left them nor "
        "as they were before it; take later edits off first, or load the model again."
    )


@plain_arithmetic()
def take_back(architecture: Architecture, updates: Sequence[LayerUpdate]) -> None:
    """Undo updates, the newest first, but for those whose weights are as they were before."""
    for update in reversed(updates):
        projections = [architecture.down_projection(update.layer)]
        if holds_updates(projections, [update.applied]):
            undo_updates(projections, [update.applied])


def put_in_place_of(
    projections: Sequence[DownProjection], applied: Sequence[Applied | None], change: Callable[[], Result]
) -> Result:
    """Take updates off, call what changes the weights otherwise, and put them back where it raises.

    Raises:
        VerificationError: the weights are neither as the updates left them nor as they were before.
    """
    held = holds_updates(projections, applied)
    try:
        if held:
            undo_updates(projections, applied)
        return change()
    except BaseException:
        for projection, record in zip(projections, applied, strict=True):
            if held and record is not None and record.undo is not None and not holds_updates([projection], [record]):
                _flip(projection.parameter.data, record.undo)
        raise


def _flip(parameter: Tensor, undo: Tensor) -> None:
    """Change the bits of a weight that are set in `undo`."""
    with writing(parameter):
        bits(own(parameter)).bitwise_xor_(own_part(undo, parameter))


def _applied(projection: DownProjection, original: Tensor) -> Applied:
    parameter, original = whole(projection.parameter.data), whole(original)
    if not torch.isfinite(parameter).all():
        raise GuardError(
            f"The update makes {projection.parameter_name} overflow {parameter.dtype}; nothing was applied."
        )
    before, after = tensor_digest(original), tensor_digest(parameter)
    return Applied(str(parameter.dtype), before, after, bits(original).bitwise_xor(bits(parameter)).cpu())


def _checked_undo(projection: DownProjection, applied: Applied | None) -> Tensor:
    """The bits that undo an update, which is known to be on the weight.

    Raises:
        VerificationError: the weight is not as the update left it.
        InputError: the bits were not kept, or are not those of such a weight.
    """
    name, parameter = projection.parameter_name, projection.parameter.data
    if applied is None:
        raise InputError(f"The update of {name} was never applied, so there is nothing to undo.")
    if applied.undo is None:
        raise InputError(
            f"The edit was saved without what undoes it at {name}; use a copy of the model it was made from."
        )
    found = tensor_digest(parameter)
    if found != applied.after:
        raise VerificationError(
            f"{name} is not as the edit left it: its sha256 is {found[:12]}, recorded was {applied.after[:12]}. "
            "Take later edits off first, or use the model that this edit was applied to."
        )
    if applied.undo.shape != parameter.shape or applied.undo.dtype != _BITS[parameter.element_size()]:
        raise InputError(
            f"What undoes the edit at {name} is {applied.undo.dtype} of shape {tuple(applied.undo.shape)}, which does "
            f"not fit the weight, {parameter.dtype} of shape {tuple(parameter.shape)}."
        )
    return applied.undo


def bits(tensor: Tensor) -> Tensor:
    """A view of a floating-point tensor as integers of the same width."""
    return tensor.view(_BITS[tensor.element_size()])


def down_projections(architecture: Architecture, updates: Sequence[LayerUpdate]) -> list[DownProjection]:
    """The weights that updates belong to.

    Raises:
        InputError: the model has no such layer, or its down-projection has another name or shape.
    """
    found = []
    for update in updates:
        projection = architecture.down_projection(update.layer)
        expected = update.factors.shape
        if projection.parameter_name != update.parameter or tuple(projection.weight.shape) != expected:
            raise InputError(
                f"The edit is of {update.parameter} {expected}, but layer {update.layer} of this model has "
                f"{projection.parameter_name} {tuple(projection.weight.shape)}."
            )
        found.append(projection)
    return found
