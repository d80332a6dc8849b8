"""Apply updates to the weights of a model, and revert them bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from rocr import ops
from rocr.edit.record import EditRecord
from rocr.edit.support import check_zeros
from rocr.edit.update import Applied, LayerUpdate
from rocr.edit.weight import Weight, edited_weights
from rocr.errors import GuardError, InputError, VerificationError
from rocr.model.architecture import Architecture, find_architecture
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
    weights: Sequence[Weight],
    updates: Sequence[Factors],
    record: Callable[[list[Applied]], object] = list,
) -> list[Applied]:
    """Add one update to each weight in place, rounding once.

    Args:
        weights: The weights to change.
        updates: One update per weight.
        record: Called with the records before this function returns, since an interruption after that may lose the
            returned value.

    Returns:
        One record per weight.

    Raises:
        InputError: An update keeps the zeros of a weight, and the weight has others.
        GuardError: A weight would not be finite. After any exception all weights have their former bits.
    """
    before = [[stored.clone() for stored in weight.stored] for weight in weights]
    try:
        pairs = list(zip(weights, updates, strict=True))
        for keep_zeros in (False, True):
            # All blocks of all layers are changed in one call.
            targets: list[Tensor] = []
            factors: list[tuple[Tensor, Tensor]] = []
            for weight, update in pairs:
                if update.matrix is None and (update.support is not None) == keep_zeros:
                    if update.support is not None:
                        check_zeros(weight, update.support)
                    targets += weight.targets
                    factors += weight.parts(update)
            lefts, rights = [left for left, _ in factors], [right for _, right in factors]
            ops.low_rank_update(targets, lefts, rights, keep_zeros=keep_zeros)
        for weight, update in pairs:
            if update.matrix is not None:
                block = weight.blocks[0]
                _add(own(block.weight), own_part(update.matrix, block.weight))
        applied = [_applied(*each) for each in zip(weights, before, strict=True)]
        record(applied)
        return applied
    except BaseException:
        stored = [tensor for weight in weights for tensor in weight.stored]
        with writing(*stored):
            for tensor, original in zip(stored, (tensor for kept in before for tensor in kept), strict=True):
                tensor.copy_(original)
        raise


def _add(weight: Tensor, update: Tensor) -> None:
    """Add a float32 matrix to a weight (d_out, d_in) in blocks of rows, rounding once to the dtype of the weight."""
    rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        block.copy_(block.float() + update[start : start + rows])


def undo_updates(weights: Sequence[Weight], applied: Sequence[Applied | None]) -> None:
    """Restore the bits that weights had before their updates.

    Raises:
        VerificationError: A weight differs from the result of its update; no weight is changed.
        InputError: The undo bits were not kept; no weight is changed.
    """
    undos = [_checked_undo(weight, record) for weight, record in zip(weights, applied, strict=True)]
    for weight, undo in zip(weights, undos, strict=True):
        _flip(weight, undo)


def holds_updates(weights: Sequence[Weight], applied: Sequence[Applied | None]) -> bool:
    """Return True if all weights have the bits after their updates, False if all have the bits before them.

    Raises:
        VerificationError: Neither is the case.
    """
    if all(record is None for record in applied):
        return False
    found = [weight.digest() for weight in weights]
    for state, name in ((True, "after"), (False, "before")):
        if all(r is not None and digest == getattr(r, name) for digest, r in zip(found, applied, strict=True)):
            return state
    raise VerificationError(
        f"{', '.join(weight.name for weight in weights)} match neither the weights after this "
        "edit nor those before it. Revert later edits first, or load the model again."
    )


@plain_arithmetic()
def revert_updates(architecture: Architecture, updates: Sequence[LayerUpdate]) -> None:
    """Undo updates, the newest first. Updates whose weights have the bits before them are skipped."""
    for update in reversed(updates):
        weights = edited_weights(architecture, [update])
        if holds_updates(weights, [update.applied]):
            undo_updates(weights, [update.applied])


def replace_updates(
    weights: Sequence[Weight], applied: Sequence[Applied | None], change: Callable[[], Result]
) -> Result:
    """Undo updates and call a function that changes the weights; restore the updates if it raises.

    Args:
        weights: The weights.
        applied: The records of the updates, one per weight.
        change: The function.

    Raises:
        VerificationError: The weights match neither those after the updates nor those before them.
    """
    held = holds_updates(weights, applied)
    try:
        if held:
            undo_updates(weights, applied)
        return change()
    except BaseException:
        for weight, record in zip(weights, applied, strict=True):
            if held and record is not None and record.undo is not None and not holds_updates([weight], [record]):
                _flip(weight, record.undo)
        raise


def _flip(weight: Weight, undo: Tensor) -> None:
    """Flip the bits of a weight that are set in `undo`."""
    for stored, flipped in zip(weight.stored, split_undo(weight, undo), strict=True):
        with writing(stored):
            bits(own(stored)).bitwise_xor_(own_part(flipped, stored))


def split_undo(weight: Weight, undo: Tensor) -> list[Tensor]:
    """Return the undo data of each block."""
    if not weight.is_mixture:
        return [undo]
    parts = torch.split(undo, [stored.numel() for stored in weight.stored])
    return [part.view(stored.shape) for part, stored in zip(parts, weight.stored, strict=True)]


def _applied(weight: Weight, originals: Sequence[Tensor]) -> Applied:
    """Return the record of a change; raise GuardError if the weight is not finite."""
    changed, originals = [whole(stored) for stored in weight.stored], [whole(original) for original in originals]
    for block, stored in zip(weight.blocks, changed, strict=True):
        if not torch.isfinite(stored).all():
            raise GuardError(f"The update makes {block.label} overflow {stored.dtype}. No update was applied.")
    return applied_of(originals, changed, weight.is_mixture)


def applied_of(originals: Sequence[Tensor], changed: Sequence[Tensor], is_mixture: bool) -> Applied:
    """Return the record of how the values of blocks changed.

    Args:
        originals: The values of each block before, in the layout of its parameter.
        changed: The values after.
        is_mixture: Whether the blocks are some of a mixture.
    """
    pairs = zip(originals, changed, strict=True)
    undo = [bits(original).bitwise_xor(bits(stored)).cpu() for original, stored in pairs]
    undo_data = torch.cat([part.reshape(-1) for part in undo]) if is_mixture else undo[0]
    return Applied(str(changed[0].dtype), tensor_digest(*originals), tensor_digest(*changed), undo_data)


def _checked_undo(weight: Weight, applied: Applied | None) -> Tensor:
    """Return the bits that undo an update, after checking that the weight carries it.

    Raises:
        VerificationError: The weight differs from the result of the update.
        InputError: The bits were not kept, or do not fit the weight.
    """
    name = weight.name
    if applied is None:
        raise InputError(f"The update of {name} was never applied, so it cannot be undone.")
    if applied.undo is None:
        raise InputError(
            f"The edit was saved without the undo data of {name}. Use a copy of the original model instead."
        )
    found = weight.digest()
    if found != applied.after:
        raise VerificationError(
            f"{name} is not the weight after this edit: its sha256 is {found[:12]}, expected {applied.after[:12]}. "
            "Revert later edits first, or use the model that this edit was applied to."
        )
    shape = tuple(weight.stored[0].shape)
    if weight.is_mixture:
        shape = (sum(stored.numel() for stored in weight.stored),)
    if tuple(applied.undo.shape) != shape or applied.undo.dtype != _INTEGER_OF_WIDTH[weight.dtype.itemsize]:
        raise InputError(
            f"The undo data of {name} is {applied.undo.dtype} of shape {tuple(applied.undo.shape)}, which does not fit "
            f"the weight, {weight.dtype} of shape {shape}."
        )
    return applied.undo


def bits(tensor: Tensor) -> Tensor:
    """Return a view of a floating-point tensor as integers of the same width."""
    return tensor.view(_INTEGER_OF_WIDTH[tensor.element_size()])


def revert_edit(edit: EditRecord, model: nn.Module) -> None:
    """Restore the weights of a model; see `rocr.Edit.revert`."""
    undo_updates(edited_weights(find_architecture(model), edit.updates), [update.applied for update in edit.updates])


@contextmanager
def without_edit(edit: EditRecord, model: nn.Module) -> Iterator[None]:
    """Return a context in which a model does not have its edit; see `rocr.Edit.reverted`."""
    weights = edited_weights(find_architecture(model), edit.updates)
    applied = [update.applied for update in edit.updates]
    undos = [_checked_undo(weight, record) for weight, record in zip(weights, applied, strict=True)]
    try:
        for weight, undo in zip(weights, undos, strict=True):
            _flip(weight, undo)
        yield
    finally:
        for weight, record, undo in zip(weights, applied, undos, strict=True):
            if not holds_updates([weight], [record]):
                _flip(weight, undo)


def apply_edit(edit: EditRecord, model: nn.Module, allow_fingerprint_mismatch: bool = False) -> None:
    """Apply an edit to a model; see `rocr.Edit.apply`."""
    architecture = find_architecture(model)
    if not allow_fingerprint_mismatch:
        _check_model(edit, architecture)
    weights = edited_weights(architecture, edit.updates)
    apply_updates(weights, [update.factors for update in edit.updates], edit.set_applied)


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
    for weight, update in zip(edited_weights(architecture, edit.updates), edit.updates, strict=True):
        if update.applied and weight.digest() == update.applied.after:
            raise InputError(f"{update.parameter} holds this edit already. Apply it to a model without the edit.")
