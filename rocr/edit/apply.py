"""Put updates onto a model's weights, and take them off again to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from rocr import ops
from rocr.edit.record import EditRecord
from rocr.edit.update import Applied, LayerUpdate
from rocr.errors import GuardError, InputError, VerificationError
from rocr.model.architecture import Architecture, DownProjection, find_architecture
from rocr.model.fingerprint import model_digest, tensor_digest
from rocr.model.tensor_parallel import own, own_part, whole
from rocr.ops.arithmetic import plain_arithmetic, writing
from rocr.solve.factors import Factors
from rocr.statistics.provenance import computed_with, different

Result = TypeVar("Result")
BLOCK_ELEMENTS = 1 << 24
"""Numbers of a weight that are held in float32 at a time (64 MiB)."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def revert_edit(edit: EditRecord, model: nn.Module) -> None:
    """Give a model back its weights; see `rocr.Edit.revert`."""
    undo_updates(down_projections(find_architecture(model), edit.updates), [update.applied for update in edit.updates])


def apply_edit(edit: EditRecord, model: nn.Module, allow_fingerprint_mismatch: bool = False) -> None:
    """Add an edit to a model; see `rocr.Edit.apply`."""
    architecture = find_architecture(model)
    if not allow_fingerprint_mismatch:
        _check_model(edit, architecture)
    projections = down_projections(architecture, edit.updates)
    apply_updates(projections, [update.factors for update in edit.updates], edit.keep)


def mismatch(edit: EditRecord, model: nn.Module) -> str | None:
    """Describe how a model differs from the one that an edit was made for; None where it does not."""
    found = model_digest(find_architecture(model), edit.fingerprint.layer, edit.fingerprint.model)
    if found != edit.fingerprint.model:
        return f"The edit was made for {edit.fingerprint}, but this model's fingerprint is {found[:12]}."
    mine, its = different(edit.computed_with, computed_with(model))
    return f"The edit was made for {edit.fingerprint} with {mine}, but this model has {its}." if mine else None


def _check_model(edit: EditRecord, architecture: Architecture) -> None:
    differs = mismatch(edit, architecture.model)
    if differs is not None:
        raise InputError(f"{differs} Allow a mismatch only for a close relative of that model.")
    projections = down_projections(architecture, edit.updates)
    for projection, update in zip(projections, edit.updates, strict=True):
        if update.applied and tensor_digest(projection.parameter.data) == update.applied.after:
            raise InputError(f"{update.parameter} holds this edit already.")
