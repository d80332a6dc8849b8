"""Checks of an edited weight and of an adapter against the record of an edit, in files of any format."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rocr.edit.update import LayerUpdate
from rocr.export.manifest import FAILED, PASSED, UNCHECKED, Check, shown
from rocr.model.fingerprint import tensor_digest

TRUNCATION_TOLERANCE = 1e-4
"""Largest relative difference of an adapter of reduced rank from one made again: singular vectors have rounding."""
NO_EDIT = "there is no readable edit file to compare with"


def digest_check(subject: str, blocks: Sequence[torch.Tensor], update: LayerUpdate, is_reverted: bool) -> Check:
    """Check the sha256 of the blocks of an edited weight against the record of the update."""
    applied = update.applied
    if applied is None:
        return Check(subject, "sha256", UNCHECKED, "the edit file has no record of an applied update")
    if str(blocks[0].dtype) != applied.dtype:
        return Check(subject, "sha256", FAILED, f"it is {blocks[0].dtype}, recorded is {shown(applied.dtype)}")
    found = tensor_digest(*blocks)
    wanted, other = (applied.before, applied.after) if is_reverted else (applied.after, applied.before)
    names = ("before", "after") if is_reverted else ("after", "before")
    if found == wanted:
        return Check(subject, "sha256", PASSED, f"as {names[0]} the edit")
    reason = f"as {names[1]} the edit" if found == other else f"{found[:12]}, recorded is {shown(wanted)[:12]}"
    return Check(subject, "sha256", FAILED, f"it is {reason}")


def distance(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Return ‖BA - B'A'‖ / ‖BA‖ for the factors of two adapters."""
    product = mine[0].double() @ mine[1].double()
    return float((product - theirs[0].double() @ theirs[1].double()).norm() / product.norm().clamp(min=1e-300))
