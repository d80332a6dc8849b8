"""Check the GGUF files of an output folder: a model against the record of the edit, and an adapter against the edit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rocr.edit.update import LayerUpdate, Part
from rocr.errors import InputError
from rocr.export.gguf_lora import AdapterPair, adapter_pairs
from rocr.export.manifest import FAILED, PASSED, UNCHECKED, Check, Output, shown
from rocr.export.weight_checks import NO_EDIT, TRUNCATION_TOLERANCE, digest_check, distance
from rocr.model.fingerprint import tensor_digest
from rocr.model.gguf_layout import GgufLayout, GgufTensor, read_gguf_layout
from rocr.model.source import ADAPTER_GGUF

if TYPE_CHECKING:
    from rocr.edit.edit import Edit


def gguf_model(output: Output) -> str | None:
    """Return the name of the GGUF file with the model of an output; None if it has none."""
    recorded = (output.report or {}).get("gguf")
    name = recorded.get("file") if isinstance(recorded, dict) else None
    return name if isinstance(name, str) else None


def gguf_checks(output: Output, edit: Edit | None) -> Iterator[Check]:
    """Check that the GGUF file of an output can be read, and its tensors against the records and the model's file."""
    name = gguf_model(output)
    assert name is not None and output.report is not None, "the output holds a GGUF file"
    recorded: dict[str, Any] = output.report["gguf"]
    try:
        if name not in output.files:
            raise InputError("it is missing, or is not a regular file")
        layout = read_gguf_layout(output.files[name])
    except (InputError, OSError) as error:
        yield Check(shown(name), "readable", FAILED, shown(str(error)))
        return
    yield Check(shown(name), "readable", PASSED, f"{len(layout.tensors)} tensors")
    same = layout.describe() == recorded.get("tensors")
    yield Check("tensors", "complete", PASSED if same else FAILED, "" if same else "they are not the recorded ones")
    if edit is None:
        yield Check("edited tensors", "sha256", UNCHECKED, NO_EDIT)
    else:
        for update in edit.updates:
            yield from _tensor_checks(layout, update, output.is_reverted)
    yield _rest_check(layout, output.report)
    yield Check("model", "fingerprint", UNCHECKED, "a GGUF file cannot be loaded in part")


def _tensor_checks(layout: GgufLayout, update: LayerUpdate, is_reverted: bool) -> Iterator[Check]:
    """Check that the tensors of an update have the recorded types and bytes and are finite."""
    records = update.applied.stored if update.applied is not None else ()
    # The parts of each tensor of a mixture, in the order of the records; a dense layer has one tensor.
    parts: dict[str, list[Part | None]] = {}
    for part in update.parts or (None,):
        parts.setdefault(part.parameter if part else update.parameter, []).append(part)
    if len(records) != len(parts):
        yield Check(shown(update.parameter), "sha256", UNCHECKED, "the edit has no record of a GGUF file")
        return
    blocks: list[torch.Tensor] = []
    for record, own in zip(records, parts.values(), strict=True):
        subject, kind = shown(record.tensor), record.before if is_reverted else record.after
        tensor = layout.tensors.get(record.tensor)
        experts = next((part.experts for part in own if part and part.expert is not None), None)
        if tensor is None or (experts is not None and tensor.shape[:1] != (experts,)):
            reason = "the file holds no such tensor" if tensor is None else f"it has the shape {tensor.shape}"
            yield Check(subject, "sha256", FAILED, reason)
        elif tensor.kind != kind:
            yield Check(subject, "sha256", FAILED, f"it is {tensor.kind}, recorded is {shown(kind)}")
        elif is_reverted:
            found = tensor_digest(tensor.read_bytes())
            wrong = "" if found == record.sha256 else f"it is {found[:12]}, recorded is {shown(record.sha256)[:12]}"
            yield Check(subject, "sha256", FAILED if wrong else PASSED, wrong or "as before the edit")
        else:
            values = tensor.read()
            finite = bool(torch.isfinite(values).all())
            reason = "" if finite else "it has values that are not finite"
            yield Check(subject, "finite", PASSED if finite else FAILED, reason)
            held = [values if part is None or part.expert is None else values[part.expert] for part in own]
            blocks += [each.T.contiguous() if update.transposed else each for each in held]
    names = [shown(record.tensor) for record in records]
    if len(blocks) == sum(map(len, parts.values())):
        yield digest_check(" and ".join(names), blocks, update, is_reverted)


def _rest_check(layout: GgufLayout, report: dict[str, Any]) -> Check:
    """Compare metadata and all other tensors with those of the model's own file, if it is still there."""
    model, weights = report.get("model"), report.get("weights")
    path = Path(model) if isinstance(model, str) else Path()
    if path.suffix != ".gguf" or not path.is_file():
        return Check("other tensors", "as in the model", UNCHECKED, "the model's own .gguf file is not here")
    edited = {
        name
        for weight in (weights if isinstance(weights, list) else [])
        if isinstance(weight, dict) and isinstance(weight.get("stored"), list)
        for name in weight["stored"]
    }
    try:
        wrong = _difference(layout, read_gguf_layout(path), edited)
    except (InputError, OSError) as error:
        return Check("other tensors", "as in the model", UNCHECKED, shown(str(error)))
    detail = f"{wrong} differs" if wrong else f"metadata and {len(layout.tensors) - len(edited)} tensors"
    return Check("other tensors", "as in the model", FAILED if wrong else PASSED, shown(detail))


def _difference(mine: GgufLayout, theirs: GgufLayout, edited: set[str]) -> str | None:
    """Return the first part outside some tensors in which two files differ; None if they do not."""
    if list(mine.tensors) != list(theirs.tensors):
        return "the list of tensors"
    ends = [min((tensor.info for tensor in each.tensors.values()), default=0) for each in (mine, theirs)]
    if ends[0] != ends[1] or not np.array_equal(_mapped(mine.path, 0, ends[0]), _mapped(theirs.path, 0, ends[1])):
        return "the metadata"
    for name, tensor in mine.tensors.items():
        if name not in edited and not _same_bytes(tensor, theirs.tensors[name]):
            return name
    return None


def _same_bytes(one: GgufTensor, other: GgufTensor) -> bool:
    if (one.kind, one.shape, one.size) != (other.kind, other.shape, other.size):
        return False
    return np.array_equal(_mapped(one.file, one.start, one.size), _mapped(other.file, other.start, other.size))


def _mapped(path: Path, start: int, size: int) -> Any:
    return np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(size,)) if size else np.empty(0, np.uint8)


def gguf_adapter_checks(output: Output, edit: Edit | None) -> Iterator[Check]:
    """Compare the adapter for llama.cpp in an output, if there is one, with the edit."""
    if ADAPTER_GGUF not in output.files or output.part:
        return
    if edit is None:
        yield Check(ADAPTER_GGUF, "agrees with the edit", UNCHECKED, NO_EDIT)
        return
    try:
        wrong = _adapter_flaw(edit, read_gguf_layout(output.files[ADAPTER_GGUF]))
    except (InputError, OSError) as error:
        wrong = str(error)
    yield Check(ADAPTER_GGUF, "agrees with the edit", FAILED if wrong else PASSED, shown(wrong))


def _adapter_flaw(edit: Edit, layout: GgufLayout) -> str:
    """Return how an adapter differs from that of the edit; empty if it does not."""
    depth, left = 1 + max(edit.layers), set(layout.tensors)
    theirs: dict[str, list[torch.Tensor]] = {}
    edited = [part.parameter for update in edit.updates for part in update.parts or (update,)]
    for parameter in dict.fromkeys(edited):
        pairs = ([f"{name}.lora_{end}" for end in "ba"] for name in layout.names_of(parameter, depth))
        names = next((pair for pair in pairs if left.issuperset(pair)), None)
        if names is None:
            return f"it has no tensors for {parameter}"
        left -= set(names)
        theirs[parameter] = [layout.tensors[name].read() for name in names]
    rank = min(each[1].shape[-2] for each in theirs.values())
    if all(_is_same(pair, theirs[pair.parameter]) for pair in adapter_pairs(edit, None)):
        wrong = None
    else:
        truncated = adapter_pairs(edit, rank, padded_to=rank)
        wrong = next((pair for pair in truncated if not _is_near(pair, theirs[pair.parameter])), None)
    if wrong is not None:
        return f"the adapter of {wrong.parameter} is not that of the edit at rank {rank}"
    return f"it has {len(left)} tensors more than the edit, such as {min(left)}" if left else ""


def _is_same(pair: AdapterPair, found: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip((pair.b, pair.a), found, strict=True))


def _is_near(pair: AdapterPair, found: list[torch.Tensor]) -> bool:
    """Return whether matrices have the product of a pair up to the rounding of singular vectors, if it is truncated."""
    if pair.layer.rank == pair.layer.full_rank:
        return _is_same(pair, found)
    fits = all(mine.shape == theirs.shape for mine, theirs in zip((pair.b, pair.a), found, strict=True))
    return fits and distance([pair.b, pair.a], found) <= TRUNCATION_TOLERANCE
