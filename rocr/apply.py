"""Put updates onto a model's weights, and take them off again to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rocr import ops
from rocr.architectures import Architecture, DownProjection
from rocr.arithmetic import plain_arithmetic, writing
from rocr.errors import GuardError, InputError, VerificationError
from rocr.fingerprint import tensor_digest
from rocr.sharding import own, own_part, whole
from rocr.solve import System

Result = TypeVar("Result")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer, Δ = left @ right, and what it was solved from.

    Attributes:
        layer: the decoder layer.
        parameter: name of its down-projection's weight in the model's state dict.
        left: (d_out, r) float32; r is n, or min(d_out, d_in) where there are more keys than inputs.
        right: (r, d_in) float32.
        keys: (n, d_in) float32.
        residuals: (n, d_out) float32.
        transposed: whether the model stores the weight as (d_in, d_out), as GPT-2 does.
        applied: what it did to a weight; None before it is applied.
        system: what it can be solved from again with other keys; None where that was not kept.
        base: sha256 of the weight that keys and residuals were measured with; None where that was not kept.
    """

    layer: int
    parameter: str
    left: Tensor
    right: Tensor
    keys: Tensor
    residuals: Tensor
    transposed: bool = False
    applied: Applied | None = None
    system: System | None = None
    base: str | None = None


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
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    keep: Callable[[list[Applied]], object] = list,
) -> list[Applied]:
    """Add left @ right to each weight in place, with one rounding.

    Args:
        projections: the down-projections to change.
        lefts: one (d_out, n) for each.
        rights: one (n, d_in) for each.
        keep: gets the records before this function returns: an interruption behind that may lose what is returned.

    Raises:
        GuardError: a weight would not be finite. On any exception all are left as they were.
    """
    parameters = [projection.parameter.data for projection in projections]
    before = [parameter.clone() for parameter in parameters]
    try:
        ops.low_rank_update(
            [own(projection.weight) for projection in projections],
            [left.to(parameter.device) for left, parameter in zip(lefts, parameters, strict=True)],
            [own_part(right, projection.weight) for right, projection in zip(rights, projections, strict=True)],
        )
        applied = [_applied(*each) for each in zip(projections, before, strict=True)]
        keep(applied)
        return applied
    except BaseException:
        with writing(*parameters):
            for parameter, original in zip(parameters, before, strict=True):
                parameter.copy_(original)
        raise


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
    name = projection.parameter_name
    if applied is None:
        raise InputError(f"The update of {name} was never applied, so there is nothing to undo.")
    if applied.undo is None:
        raise InputError(
            f"The edit was saved without what undoes it at {name}; use a copy of the model it was made from."
        )
    found = tensor_digest(projection.parameter.data)
    if found != applied.after:
        raise VerificationError(
            f"{name} is not as the edit left it: its sha256 is {found[:12]}, recorded was {applied.after[:12]}. "
            "Take later edits off first, or use the model that this edit was applied to."
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
        expected = (update.left.shape[0], update.right.shape[1])
        if projection.parameter_name != update.parameter or tuple(projection.weight.shape) != expected:
            raise InputError(
                f"The edit is of {update.parameter} {expected}, but layer {update.layer} of this model has "
                f"{projection.parameter_name} {tuple(projection.weight.shape)}."
            )
        found.append(projection)
    return found
