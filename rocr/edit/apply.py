"""Apply updates to the weights of a model, and revert them bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from rocr import ops
from rocr.edit.record import EditRecord
from rocr.edit.update import Applied, LayerUpdate
from rocr.errors import GuardError, InputError, VerificationError
from rocr.model.architecture import Architecture, Block, find_architecture
from rocr.model.fingerprint import model_digest, tensor_digest
from rocr.model.tensor_parallel import own, own_part, whole
from rocr.ops.arithmetic import plain_arithmetic, writing
from rocr.solve.factors import Factors
from rocr.statistics.provenance import computed_with, different

Result = TypeVar("Result")
BLOCK_ELEMENTS = 1 << 24
"""Largest number of entries of a weight that are converted to float32 at a time (64 MiB)."""
_INTEGER_OF_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_updates(
    projections: Sequence[Block],
    updates: Sequence[Factors],
    record: Callable[[list[Applied]], object] = list,
) -> list[Applied]:
    """Add one update to each weight in place, rounding once.

    Args:
        projections: The down-projections to change.
        updates: One update per projection.
        record: Called with the records before this function returns, since an interruption after that may lose the
            returned value.

    Returns:
        One record per projection.

    Raises:
        GuardError: A weight would not be finite. After any exception all weights have their former bits.
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
        record(applied)
        return applied
    except BaseException:
        with writing(*parameters):
            for parameter, original in zip(parameters, before, strict=True):
                parameter.copy_(original)
        raise


def _add(weight: Tensor, update: Tensor) -> None:
    """Add a float32 matrix to a weight (d_out, d_in) in blocks of rows, rounding once to the dtype of the weight."""
    rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        block.copy_(block.float() + update[start : start + rows])


def undo_updates(projections: Sequence[Block], applied: Sequence[Applied | None]) -> None:
    """Restore the bits that weights had before their updates.

    Raises:
        VerificationError: A weight differs from the result of its update; no weight is changed.
        InputError: The undo bits were not kept; no weight is changed.
    """
    undos = [_checked_undo(projection, record) for projection, record in zip(projections, applied, strict=True)]
    for projection, undo in zip(projections, undos, strict=True):
        _flip(projection.parameter.data, undo)


def holds_updates(projections: Sequence[Block], applied: Sequence[Applied | None]) -> bool:
    """Return True if all weights have the bits after their updates, False if all have the bits before them.

    Raises:
        VerificationError: Neither is the case.
    """
    if all(record is None for record in applied):
        return False
    found = [tensor_digest(projection.parameter.data) for projection in projections]
    for state, name in ((True, "after"), (False, "before")):
        if all(r is not None and digest == getattr(r, name) for digest, r in zip(found, applied, strict=True)):
            return state
    raise VerificationError(
        f"{', '.join(projection.parameter_name for projection in projections)} match neither the weights after this "
        "edit nor those before it. Revert later edits first, or load the model again."
    )


@plain_arithmetic()
def revert_updates(architecture: Architecture, updates: Sequence[LayerUpdate]) -> None:
    """Undo updates, the newest first. Updates whose weights have the bits before them are skipped."""
    for update in reversed(updates):
        projections = [architecture.down_projection(update.layer)]
        if holds_updates(projections, [update.applied]):
            undo_updates(projections, [update.applied])


def replace_updates(
    projections: Sequence[Block], applied: Sequence[Applied | None], change: Callable[[], Result]
) -> Result:
    """Undo updates and call a function that changes the weights; restore the updates if it raises.

    Args:
        projections: The down-projections.
        applied: The records of the updates, one per projection.
        change: The function.

    Raises:
        VerificationError: The weights match neither those after the updates nor those before them.
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
    """Flip the bits of a weight that are set in `undo`."""
    with writing(parameter):
        bits(own(parameter)).bitwise_xor_(own_part(undo, parameter))


def _applied(projection: Block, original: Tensor) -> Applied:
    """Return the record of a change; raise GuardError if the weight is not finite."""
    parameter, original = whole(projection.parameter.data), whole(original)
    if not torch.isfinite(parameter).all():
        raise GuardError(
            f"The update makes {projection.parameter_name} overflow {parameter.dtype}. No update was applied."
        )
    before, after = tensor_digest(original), tensor_digest(parameter)
    return Applied(str(parameter.dtype), before, after, bits(original).bitwise_xor(bits(parameter)).cpu())


def _checked_undo(projection: Block, applied: Applied | None) -> Tensor:
    """Return the bits that undo an update, after checking that the weight carries it.

    Raises:
        VerificationError: The weight differs from the result of the update.
        InputError: The bits were not kept, or do not fit the weight.
    """
    name, parameter = projection.parameter_name, projection.parameter.data
    if applied is None:
        raise InputError(f"The update of {name} was never applied, so it cannot be undone.")
    if applied.undo is None:
        raise InputError(
            f"The edit was saved without the undo data of {name}. Use a copy of the original model instead."
        )
    found = tensor_digest(parameter)
    if found != applied.after:
        raise VerificationError(
            f"{name} is not the weight after this edit: its sha256 is {found[:12]}, expected {applied.after[:12]}. "
            "Revert later edits first, or use the model that this edit was applied to."
        )
    if applied.undo.shape != parameter.shape or applied.undo.dtype != _INTEGER_OF_WIDTH[parameter.element_size()]:
        raise InputError(
            f"The undo data of {name} is {applied.undo.dtype} of shape {tuple(applied.undo.shape)}, which does not fit "
            f"the weight, {parameter.dtype} of shape {tuple(parameter.shape)}."
        )
    return applied.undo


def bits(tensor: Tensor) -> Tensor:
    """Return a view of a floating-point tensor as integers of the same width."""
    return tensor.view(_INTEGER_OF_WIDTH[tensor.element_size()])


def down_projections(architecture: Architecture, updates: Sequence[LayerUpdate]) -> list[Block]:
    """Return the down-projections that updates belong to.

    Raises:
        InputError: The model has no such layer, or its down-projection has another name or shape.
    """
    found = []
    for update in updates:
        projection = architecture.down_projection(update.layer)
        expected = update.factors.shape
        if projection.parameter_name != update.parameter or tuple(projection.weight.shape) != expected:
            raise InputError(
                f"The edit changes {update.parameter} {expected}, but layer {update.layer} of this model has "
                f"{projection.parameter_name} {tuple(projection.weight.shape)}."
            )
        found.append(projection)
    return found


def revert_edit(edit: EditRecord, model: nn.Module) -> None:
    """Restore the weights of a model; see `rocr.Edit.revert`."""
    undo_updates(down_projections(find_architecture(model), edit.updates), [update.applied for update in edit.updates])


def apply_edit(edit: EditRecord, model: nn.Module, allow_fingerprint_mismatch: bool = False) -> None:
    """Apply an edit to a model; see `rocr.Edit.apply`."""
    architecture = find_architecture(model)
    if not allow_fingerprint_mismatch:
        _check_model(edit, architecture)
    projections = down_projections(architecture, edit.updates)
    apply_updates(projections, [update.factors for update in edit.updates], edit.set_applied)


def mismatch(edit: EditRecord, model: nn.Module) -> str | None:
    """Return a sentence on how a model differs from the one that an edit was made for; None if it does not."""
    found = model_digest(find_architecture(model), edit.fingerprint.layer, edit.fingerprint.model)
    if found != edit.fingerprint.model:
        return f"The edit was made for {edit.fingerprint}, but this model's fingerprint is {found[:12]}."
    mine, its = different(edit.computed_with, computed_with(model))
    return f"The edit was made for {edit.fingerprint} with {mine}, but this model has {its}." if mine else None


def _check_model(edit: EditRecord, architecture: Architecture) -> None:
    """Raise InputError if a model is not the one that an edit was made for, or has the edit applied."""
    differs = mismatch(edit, architecture.model)
    if differs is not None:
        raise InputError(
            f"{differs} Apply it to that model, or allow a mismatch if this one is a close relative of it."
        )
    projections = down_projections(architecture, edit.updates)
    for projection, update in zip(projections, edit.updates, strict=True):
        if update.applied and tensor_digest(projection.parameter.data) == update.applied.after:
            raise InputError(f"{update.parameter} holds this edit already. Apply it to a model without the edit.")
