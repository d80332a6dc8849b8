"""Check an output folder against its own records: its files, and its edit against the report, weights and adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rocr.config import with_new_setting_names
from rocr.edit.lora import adapter_tensors
from rocr.edit.update import LayerUpdate
from rocr.errors import InputError
from rocr.export.copying import EDIT_FILE, REPORT_FILE
from rocr.export.manifest import (
    ADAPTER_SETTINGS,
    FAILED,
    PASSED,
    UNCHECKED,
    Check,
    Output,
    file_checks,
    open_output,
    shown,
)
from rocr.export.rewrite import ADAPTER_FILE
from rocr.export.verify_gguf import gguf_adapter_checks, gguf_checks, gguf_model
from rocr.export.weight_checks import NO_EDIT, TRUNCATION_TOLERANCE, digest_check, distance
from rocr.io.concept_files import FIELDS
from rocr.io.dtypes import SUPPORTED_DTYPES, torch_dtype
from rocr.io.safetensors_layout import read_layout
from rocr.model.check_folder import INDEX_FILE, SINGLE_FILE, check_model_folder
from rocr.model.fingerprint import Fingerprint, model_digest, tokenizer_digest
from rocr.model.quantised.checkpoint import QuantisedWeight, find_quantisation, quantised_weights
from rocr.model.quantised.place import QuantisedPlace
from rocr.model.stored_weights import Place, layout
from rocr.model.weight_files import WeightFiles, find_weight_files
from rocr.progress import Progress, ProgressCallback, silent

if TYPE_CHECKING:
    from rocr.edit.edit import Edit

_DTYPES = frozenset(f"torch.{name}" for name in SUPPORTED_DTYPES)


def verify_output(
    folder: str | os.PathLike[str],
    edit: str | os.PathLike[str] | None = None,
    progress: ProgressCallback = silent,
) -> list[Check]:
    """Check a folder that `rocr unlearn`, `apply` or `revert` wrote.

    Args:
        folder: The output folder, or the adapter folder in it.
        edit: An edit file elsewhere, which is needed to check the weights of a reverted output. None uses the edit
            file of the output.
        progress: Called after every file.

    Returns:
        All checks, failed ones included.

    Raises:
        InputError: The folder is no output of rocr, or there is no such edit file.
    """
    output, checks = open_output(Path(folder), None if edit is None else Path(edit))
    total = len(output.names)
    for i, found in enumerate(file_checks(output)):
        checks.append(found)
        progress(Progress("files", i + 1, total, "files"))
    return checks + _edit_checks(output)


def _edit_checks(output: Output) -> list[Check]:
    """Check the edit file, and the report, the weights and the adapter against it."""
    edit, checks = _load_edit(output)
    if not output.part:
        if edit is not None and output.report is not None:
            checks.append(_report_check(edit, output.report))
        checks += _model_checks(output, edit)
    return [*checks, *_adapter_checks(output, edit)]


def _load_edit(output: Output) -> tuple[Edit | None, list[Check]]:
    """Read the edit file of an output, if there is one, and return it with the check of it."""
    from rocr.edit.edit import Edit

    name = EDIT_FILE if output.edit is None else shown(str(output.edit))
    if output.edit is None:
        reason = "a reverted output has no edit file; give one with --edit" if output.is_reverted else "none was saved"
        return None, [] if EDIT_FILE in output.recorded else [Check(name, "consistent", UNCHECKED, reason)]
    try:
        return Edit.load(output.edit), [Check(name, "consistent", PASSED)]
    except InputError as error:
        return None, [Check(name, "consistent", FAILED, shown(str(error)))]


def _report_check(edit: Edit, report: dict[str, Any]) -> Check:
    """Compare the report with the edit file in the fields that both have."""
    concepts = report.get("concepts")
    plain = [
        {name: value for name, value in concept.items() if name in FIELDS} if isinstance(concept, dict) else concept
        for concept in (concepts if isinstance(concepts, list) else [])
    ]
    both = {
        "fingerprint": (edit.fingerprint.to_json(), report.get("fingerprint")),
        "config": (edit.config.to_json(), with_new_setting_names(report.get("config"))),
        "concepts": ([concept.to_json() for concept in edit.concepts], plain),
        "layers": ([asdict(layer) for layer in edit.report.layers], report.get("layers")),
        "statistics": (edit.report.statistics, report.get("statistics")),
        "divergence": (edit.report.divergence, report.get("divergence")),
        "drift": (edit.report.drift, report.get("drift")),
        "limits_passed": (edit.report.limits_passed, report.get("limits_passed")),
    }
    # Compared as text, since NaN does not equal itself.
    different = [name for name, values in both.items() if len({json.dumps(v, sort_keys=True) for v in values}) > 1]
    if different:
        return Check(REPORT_FILE, "agrees with the edit", FAILED, f"they differ in {', '.join(different)}")
    return Check(REPORT_FILE, "agrees with the edit", PASSED)


def _model_checks(output: Output, edit: Edit | None) -> Iterator[Check]:
    """Check that the model can be read, and its tensors and fingerprint against the records."""
    names = {*output.recorded, *output.files}
    if gguf_model(output) is not None:
        yield from gguf_checks(output, edit)
        return
    if not names & {INDEX_FILE, SINGLE_FILE, "config.json"}:
        yield Check("model", "weights", UNCHECKED, "the output holds no model")
        return
    try:
        check_model_folder(output.folder)
        files = find_weight_files(output.folder)
        if files is None:
            raise InputError(f"there is no {SINGLE_FILE} and no {INDEX_FILE}.")
    except (InputError, OSError) as error:
        yield Check("model", "readable", FAILED, shown(str(error)))
        return
    yield Check("model", "readable", PASSED, f"config.json and {len(files.files)} weight files")
    yield _layout_check(files, output.report)
    if edit is None:
        yield Check("edited tensors", "sha256", UNCHECKED, NO_EDIT)
    else:
        for update in edit.updates:
            if update.parts:
                yield from _mixture_checks(files, update, _recorded_parts(output.report, update), output.is_reverted)
            else:
                yield from _tensor_checks(files, update, _recorded_names(output.report, update), output.is_reverted)
    yield from _fingerprint_checks(output, edit)


def _layout_check(files: WeightFiles, report: dict[str, Any] | None) -> Check:
    """Check that the weight files hold exactly the recorded tensors."""
    recorded = (report or {}).get("tensors")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("of"), str):
        return Check("tensors", "complete", UNCHECKED, "the report does not list them")
    try:
        if recorded["of"] != "names":
            files.read_headers()
        found = layout(files)
    except (InputError, OSError) as error:
        return Check("tensors", "complete", FAILED, shown(str(error)))
    if found == recorded:
        return Check("tensors", "complete", PASSED, f"{found['count']} by their {found['of']}")
    counts = f"{found['count']} are there, recorded are {shown(str(recorded.get('count')))}"
    return Check("tensors", "complete", FAILED, f"they differ in their {found['of']}: {counts}")


def _recorded_names(report: dict[str, Any] | None, update: LayerUpdate) -> list[str]:
    """Return the names of an edited weight in the files, from the report; without a record, its name in the model."""
    weights = (report or {}).get("weights")
    for weight in weights if isinstance(weights, list) else []:
        if isinstance(weight, dict) and weight.get("parameter") == update.parameter:
            stored = weight.get("stored")
            if isinstance(stored, list) and stored and all(isinstance(name, str) for name in stored):
                return stored
    # A checkpoint of the base model without a head has names without the first part.
    return [update.parameter, update.parameter.partition(".")[2]]


def _recorded_parts(report: dict[str, Any] | None, update: LayerUpdate) -> list[dict[str, Any]]:
    """Return where the files hold the blocks of a mixture, from the report; empty without a valid record."""
    for weight in (report or {}).get("weights") or []:
        if isinstance(weight, dict) and weight.get("parameter") == update.parameter:
            parts = weight.get("parts")
            if isinstance(parts, list) and len(parts) == len(update.parts) and all(map(_is_part, parts)):
                return parts
    return []


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or part.keys() != {"stored", "expert", "experts", "flipped"}:
        return False
    expert, experts = part["expert"], part["experts"]
    is_index = expert is None or (isinstance(expert, int) and isinstance(experts, int) and 0 <= expert < experts)
    return is_index and isinstance(part["stored"], str) and isinstance(part["flipped"], bool)


def _mixture_checks(
    files: WeightFiles, update: LayerUpdate, parts: list[dict[str, Any]], is_reverted: bool
) -> Iterator[Check]:
    """Check that the edited experts of a layer have the recorded bytes and are finite."""
    subject = f"{shown(update.parameter)} of {len(update.parts)} experts"
    if not parts or any(part["stored"] not in files.file_of for part in parts):
        yield Check(subject, "sha256", UNCHECKED, "the report does not say where the files hold them")
        return
    packed = {name: weight for weight in quantised_weights(files) for name in weight.names.values()}
    try:
        blocks = [_recorded_block(files, packed, update, index, part) for index, part in enumerate(parts)]
    except (InputError, OSError, RuntimeError, IndexError) as error:
        yield Check(subject, "readable", FAILED, shown(str(error)))
        return
    yield digest_check(subject, blocks, update, is_reverted)
    finite = all(bool(torch.isfinite(block).all()) for block in blocks)
    yield Check(subject, "finite", PASSED if finite else FAILED, "" if finite else "one has values that are not finite")


def _recorded_block(
    files: WeightFiles, packed: dict[str, QuantisedWeight], update: LayerUpdate, index: int, part: dict[str, Any]
) -> torch.Tensor:
    """Read a block of a mixture; one that is quantised, in the dtype of the record."""
    weight = packed.get(part["stored"])
    if weight is None:
        return Place(files.find(part["stored"]), part["expert"], part["experts"], part["flipped"]).read()
    shape = (update.factors.shape[0], update.parts[index].width)
    held = shape[::-1] if update.parts[index].transposed else shape
    values = QuantisedPlace(weight, held, part["expert"], part["flipped"]).read()
    return values.to(_recorded_dtype(update) or values.dtype)


def _recorded_dtype(update: LayerUpdate) -> torch.dtype | None:
    """Return the dtype in which the digest of an edited weight was taken; None if it is not known."""
    if update.applied is None or update.applied.dtype not in _DTYPES:
        return None
    return torch_dtype(update.applied.dtype.removeprefix("torch."))


def _tensor_checks(files: WeightFiles, update: LayerUpdate, recorded: list[str], is_reverted: bool) -> Iterator[Check]:
    """Check that an edited weight has the recorded bytes and is finite."""
    names = [name for name in recorded if name in files.file_of]
    quantised = {name: weight for weight in quantised_weights(files) for name in {weight.name, *weight.names.values()}}
    of_parts = {quantised[name].module: quantised[name] for name in recorded if name in quantised}
    for module, weight in of_parts.items():
        try:
            values = weight.read(update.factors.shape)
            values = values.to(_recorded_dtype(update) or values.dtype)
            yield digest_check(shown(module), [values], update, is_reverted)
        except (InputError, OSError) as error:
            yield Check(shown(module), "readable", FAILED, shown(str(error)))
    names = [name for name in names if name not in quantised]
    if not names and not of_parts:
        yield Check(shown(update.parameter), "sha256", UNCHECKED, "the files hold no tensor of this name")
    for name in names:
        subject = shown(name)
        try:
            values = files.find(name).read()
        except (InputError, OSError) as error:
            yield Check(subject, "readable", FAILED, shown(str(error)))
            continue
        yield digest_check(subject, [values], update, is_reverted)
        finite = bool(torch.isfinite(values).all())
        yield Check(
            subject, "finite", PASSED if finite else FAILED, "" if finite else "it has values that are not finite"
        )


def _fingerprint_checks(output: Output, edit: Edit | None) -> Iterator[Check]:
    """Compare the fingerprint of the model, which samples the other weights, and of the tokenizer with the record."""
    from rocr.model.architecture import find_architecture
    from rocr.model.load import find_model
    from rocr.model.load_partial import load_partial, partial_model

    mark, reason = _recorded_fingerprint(output, edit)
    try:
        if mark is None:
            yield Check("model", "fingerprint", UNCHECKED, reason)
            return
        source = find_model(str(output.folder))
        empty = partial_model(source, mark.layer)
        if empty is None:
            yield Check("model", "fingerprint", UNCHECKED, "the model cannot be loaded in part")
            return
        # An edit made with --dtype float16 has the fingerprint of values that were rounded to float16.
        for dtype in (None, torch.float16):
            loaded = load_partial(source, mark.layer, dtype=dtype, empty=None if dtype else empty)
            found = model_digest(find_architecture(loaded.model), mark.layer, mark.model)
            if found == mark.model:
                break
        tokenizer = tokenizer_digest(loaded.tokenizer)
    except Exception as error:  # transformers raises many types of errors for invalid files
        yield Check("model", "fingerprint", FAILED, shown(f"it cannot be loaded: {error}"))
        return
    for name, digest, wanted in (("model", found, mark.model), ("tokenizer", tokenizer, mark.tokenizer)):
        same = digest == wanted
        if not same and name == "model" and find_quantisation(output.folder) is not None:
            reason = "it was recorded of values that the library of the quantisation read, not rocr"
            yield Check(name, "fingerprint", UNCHECKED, reason)
            continue
        detail = f"samples of layers 0 to {mark.layer}, without the edited weights" if name == "model" else ""
        wrong = f"it is {digest[:12]}, recorded is {shown(wanted)[:12]}"
        yield Check(name, "fingerprint", PASSED if same else FAILED, detail if same else wrong)


def _recorded_fingerprint(output: Output, edit: Edit | None) -> tuple[Fingerprint | None, str]:
    """Return the fingerprint in the edit or else the report, or None and the reason."""
    if edit is not None:
        return edit.fingerprint, ""
    try:
        return Fingerprint(**(output.report or {})["fingerprint"]), ""
    except (KeyError, TypeError):
        return None, "no readable record has it"


def _adapter_checks(output: Output, edit: Edit | None) -> Iterator[Check]:
    """Compare every adapter in the output with that of the edit."""
    yield from gguf_adapter_checks(output, edit)
    for name, path in output.files.items():
        if Path(name).name != ADAPTER_FILE or not name.startswith(output.part):
            continue
        if edit is None:
            yield Check(shown(name), "agrees with the edit", UNCHECKED, NO_EDIT)
            continue
        try:
            found = {tensor: place.read() for tensor, place in read_layout(path).items()}
            settings = json.loads((path.parent / ADAPTER_SETTINGS).read_bytes())
            wrong = _adapter_flaw(edit, found, settings)
        except (InputError, OSError, ValueError, RecursionError) as error:
            wrong = shown(str(error))
        yield Check(shown(name), "agrees with the edit", FAILED if wrong else PASSED, wrong)


def _adapter_flaw(edit: Edit, found: dict[str, torch.Tensor], settings: Any) -> str:
    """Return how an adapter differs from that of the edit; empty if it does not."""
    rank = settings.get("r") if isinstance(settings, dict) else None
    wanted, wanted_settings, layers = adapter_tensors(edit, rank)
    if settings != wanted_settings:
        return f"{ADAPTER_SETTINGS} is not that of the edit"
    if set(found) != set(wanted):
        return f"its {len(found)} tensors are not the {len(wanted)} tensors of the edit"
    modules = [(module, layer) for layer in layers for module in layer.modules]
    for module, layer in modules:
        names = [f"base_model.model.{module}.lora_{factor}.weight" for factor in "BA"]
        mine, theirs = ([tensors[name] for name in names] for tensors in (wanted, found))
        if any(a.shape != b.shape for a, b in zip(mine, theirs, strict=True)):
            return f"{module} has factors of other shapes than the edit"
        if layer.rank == layer.full_rank:
            different = [n for n, a, b in zip(names, mine, theirs, strict=True) if not torch.equal(a, b)]
            if different:
                return f"{different[0]} is not that of the edit"
        elif distance(mine, theirs) > TRUNCATION_TOLERANCE:
            return f"{module} is not that of the edit at rank {layer.rank}"
    return ""
