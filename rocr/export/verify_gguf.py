"""Check the GGUF files of an output folder: a model against the record of the edit, and an adapter against the edit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rocr.edit.lora import adapter_layer
from rocr.edit.update import LayerUpdate
from rocr.errors import InputError
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
    """Check that an edited tensor has the recorded type and bytes and is finite."""
    stored = None if update.applied is None else update.applied.stored
    if stored is None or stored.tensor not in layout.tensors:
        reason = "the edit has no record of a GGUF file" if stored is None else "the file holds no such tensor"
        subject = update.parameter if stored is None else stored.tensor
        yield Check(shown(subject), "sha256", UNCHECKED if stored is None else FAILED, reason)
        return
    tensor, kind = layout.tensors[stored.tensor], stored.before if is_reverted else stored.after
    subject = shown(tensor.name)
    if tensor.kind != kind:
        yield Check(subject, "sha256", FAILED, f"it is {tensor.kind}, recorded is {shown(kind)}")
        return
    if is_reverted:
        found = tensor_digest(tensor.read_bytes())
        wrong = "" if found == stored.sha256 else f"it is {found[:12]}, recorded is {shown(stored.sha256)[:12]}"
        yield Check(subject, "sha256", FAILED if wrong else PASSED, wrong or "as before the edit")
        return
    values = tensor.read()
    yield digest_check(subject, [values.T.contiguous() if update.transposed else values], update, is_reverted)
    finite = bool(torch.isfinite(values).all())
    yield Check(subject, "finite", PASSED if finite else FAILED, "" if finite else "it has values that are not finite")


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
    for update in edit.updates:
        pairs = ([f"{name}.lora_{end}" for end in "ba"] for name in layout.names_of(update.parameter, depth))
        names = next((pair for pair in pairs if left.issuperset(pair)), None)
        if names is None:
            return f"it has no tensors for {update.parameter}"
        left -= set(names)
        theirs = [layout.tensors[name].read() for name in names]
        rank = theirs[1].shape[0]
        layer, *mine = adapter_layer(update, rank)
        if any(a.shape != b.shape for a, b in zip(_padded(mine, rank), theirs, strict=True)):
            return f"{names[0]} and {names[1]} have other shapes than in the edit"
        if layer.rank == layer.full_rank:
            if not all(torch.equal(a, b) for a, b in zip(_padded(mine, rank), theirs, strict=True)):
                return f"{names[0].removesuffix('.lora_b')} is not that of the edit"
        elif distance(_padded(mine, rank), theirs) > TRUNCATION_TOLERANCE:
            return f"{names[0].removesuffix('.lora_b')} is not that of the edit at rank {layer.rank}"
    return f"it has {len(left)} tensors more than the edit, such as {min(left)}" if left else ""


def _padded(factors: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
    """Return the factors B and A padded with zeros to a rank."""
    left, right = factors
    missing = max(0, rank - right.shape[0])
    return [
        torch.nn.functional.pad(left.float(), (0, missing)),
        torch.nn.functional.pad(right.float(), (0, 0, 0, missing)),
    ]
