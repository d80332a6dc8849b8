"""Check an output's edit file, the weights it speaks of, the model's fingerprint and the adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rocr.edit.lora import adapter_tensors
from rocr.edit.update import LayerUpdate
from rocr.errors import InputError
from rocr.export.verify_files import ADAPTER_SETTINGS, EDIT_FILE, FAILED, PASSED, UNCHECKED, Check, Output, shown
from rocr.io.safetensors_layout import read_layout
from rocr.model.check_folder import INDEX_FILE, SINGLE_FILE, check_model_folder
from rocr.model.fingerprint import Fingerprint, model_digest, tensor_digest, tokenizer_digest
from rocr.model.stored_weights import layout
from rocr.model.weight_files import WeightFiles, find_weight_files

if TYPE_CHECKING:
    from rocr.edit.edit import Edit

ADAPTER_FILE = "adapter_model.safetensors"
CUT_TOLERANCE = 1e-4
"""How far an adapter cut to a rank may be from the same cut made again: singular vectors differ by their rounding."""
NO_EDIT = "there is no edit file that can be read to tell"


def edit_checks(output: Output) -> list[Check]:
    """What the edit file tells about itself, the report, the weights, and the adapter."""
    edit, checks = _load_edit(output)
    if output.part:
        return [*checks, *_adapter_checks(output, edit)]
    if edit is not None and output.report is not None:
        checks.append(_report_check(edit, output.report))
    checks += _model_checks(output, edit)
    checks += _adapter_checks(output, edit)
    return checks


def _load_edit(output: Output) -> tuple[Edit | None, list[Check]]:
    from rocr.edit.edit import Edit

    name = EDIT_FILE if output.edit is None else shown(str(output.edit))
    if output.edit is None:
        reason = "a reverted output holds none; name it with --edit" if output.is_reverted else "none was saved"
        return None, [] if EDIT_FILE in output.recorded else [Check(name, "consistent", UNCHECKED, reason)]
    try:
        return Edit.load(output.edit), [Check(name, "consistent", PASSED)]
    except InputError as error:
        return None, [Check(name, "consistent", FAILED, shown(str(error)))]


def _report_check(edit: Edit, report: dict[str, Any]) -> Check:
    """Whether report and edit file say the same where both say something."""
    concepts = report.get("concepts")
    plain = [
        {name: concept.get(name) for name in ("name", "redirect", "aliases")} if isinstance(concept, dict) else concept
        for concept in (concepts if isinstance(concepts, list) else [])
    ]
    both = {
        "fingerprint": (edit.fingerprint.to_json(), report.get("fingerprint")),
        "config": (edit.config.to_json(), report.get("config")),
        "concepts": ([asdict(concept) for concept in edit.concepts], plain),
        "layers": ([asdict(layer) for layer in edit.report.layers], report.get("layers")),
        "statistics": (edit.report.statistics, report.get("statistics")),
        "divergence": (edit.report.divergence, report.get("divergence")),
        "limits_passed": (edit.report.limits_passed, report.get("limits_passed")),
    }
    # As text, since a number that is none does not equal itself.
    different = [name for name, values in both.items() if len({json.dumps(v, sort_keys=True) for v in values}) > 1]
    if different:
        return Check("report.json", "agrees with the edit", FAILED, f"they differ in {', '.join(different)}")
    return Check("report.json", "agrees with the edit", PASSED)


def _model_checks(output: Output, edit: Edit | None) -> Iterator[Check]:
    names = {*output.recorded, *output.files}
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
            yield from _tensor_checks(files, update, _recorded_names(output.report, update), output.is_reverted)
    yield from _fingerprint_checks(output, edit)


def _layout_check(files: WeightFiles, report: dict[str, Any] | None) -> Check:
    """Whether the files hold the tensors that were written, all of them and no others."""
    recorded = (report or {}).get("tensors")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("of"), str):
        return Check("tensors", "complete", UNCHECKED, "the report does not say which there are")
    try:
        if recorded["of"] != "names":
            files.read_headers()
        found = layout(files)
    except (InputError, OSError) as error:
        return Check("tensors", "complete", FAILED, shown(str(error)))
    if found == recorded:
        return Check("tensors", "complete", PASSED, f"{found['count']} by their {found['of']}")
    counts = f"{found['count']} are there, recorded were {shown(str(recorded.get('count')))}"
    return Check("tensors", "complete", FAILED, f"they differ in their {found['of']}: {counts}")


def _recorded_names(report: dict[str, Any] | None, update: LayerUpdate) -> list[str]:
    """What an edited weight is called in the files, as the report says; without a record, its name in the model."""
    weights = (report or {}).get("weights")
    for weight in weights if isinstance(weights, list) else []:
        if isinstance(weight, dict) and weight.get("parameter") == update.parameter:
            stored = weight.get("stored")
            if isinstance(stored, list) and stored and all(isinstance(name, str) for name in stored):
                return stored
    # A checkpoint of the base model leaves out the first part of a name.
    return [update.parameter, update.parameter.partition(".")[2]]


def _tensor_checks(files: WeightFiles, update: LayerUpdate, recorded: list[str], is_reverted: bool) -> Iterator[Check]:
    """Whether a weight has the bytes that the edit recorded, and is finite."""
    names = [name for name in recorded if name in files.file_of]
    if not names:
        yield Check(shown(update.parameter), "sha256", UNCHECKED, "the files hold no tensor of this name")
    for name in names:
        subject = shown(name)
        try:
            values = files.find(name).read()
        except (InputError, OSError) as error:
            yield Check(subject, "readable", FAILED, shown(str(error)))
            continue
        yield _digest_check(subject, values, update, is_reverted)
        finite = bool(torch.isfinite(values).all())
        yield Check(subject, "finite", PASSED if finite else FAILED, "" if finite else "it holds numbers that are not")


def _digest_check(subject: str, values: torch.Tensor, update: LayerUpdate, is_reverted: bool) -> Check:
    applied = update.applied
    if applied is None:
        return Check(subject, "sha256", UNCHECKED, "the edit file does not say what it did to a weight")
    if str(values.dtype) != applied.dtype:
        return Check(subject, "sha256", FAILED, f"it is {values.dtype}, recorded was {shown(applied.dtype)}")
    found = tensor_digest(values)
    wanted, other = (applied.before, applied.after) if is_reverted else (applied.after, applied.before)
    names = ("before", "after") if is_reverted else ("after", "before")
    if found == wanted:
        return Check(subject, "sha256", PASSED, f"as {names[0]} the edit")
    reason = f"as {names[1]} the edit" if found == other else f"{found[:12]}, recorded was {shown(wanted)[:12]}"
    return Check(subject, "sha256", FAILED, f"it is {reason}")


def _fingerprint_checks(output: Output, edit: Edit | None) -> Iterator[Check]:
    """Whether the rest of the model, as far as it is sampled, and the tokenizer are those of the edit."""
    from rocr.model.load import find_model
    from rocr.model.load_partial import can_load_partially, load_partial

    mark, reason = _recorded_fingerprint(output, edit)
    try:
        if mark is None:
            yield Check("model", "fingerprint", UNCHECKED, reason)
            return
        source = find_model(str(output.folder))
        if not can_load_partially(source, mark.layer):
            yield Check("model", "fingerprint", UNCHECKED, "the model cannot be loaded in part")
            return
        # Of an edit made with --dtype float16 the fingerprint is that of values rounded twice.
        for dtype in (None, torch.float16):
            loaded = load_partial(source, mark.layer, dtype=dtype)
            found = model_digest(loaded.architecture, mark.layer, mark.model)
            if found == mark.model:
                break
        tokenizer = tokenizer_digest(loaded.tokenizer)
    except Exception as error:  # tokenizers and configurations of others raise whatever they like
        yield Check("model", "fingerprint", FAILED, shown(f"it cannot be loaded: {error}"))
        return
    for name, digest, wanted in (("model", found, mark.model), ("tokenizer", tokenizer, mark.tokenizer)):
        same = digest == wanted
        detail = f"samples of layers 0 to {mark.layer} but the edited weights" if name == "model" else ""
        wrong = f"it is {digest[:12]}, recorded was {shown(wanted)[:12]}"
        yield Check(name, "fingerprint", PASSED if same else FAILED, detail if same else wrong)


def _recorded_fingerprint(output: Output, edit: Edit | None) -> tuple[Fingerprint | None, str]:
    if edit is not None:
        return edit.fingerprint, ""
    try:
        return Fingerprint(**(output.report or {})["fingerprint"]), ""
    except (KeyError, TypeError):
        return None, "no record that can be read holds it"


def _adapter_checks(output: Output, edit: Edit | None) -> Iterator[Check]:
    """Whether every adapter in the output is that of the edit."""
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
    rank = settings.get("r") if isinstance(settings, dict) else None
    wanted, wanted_settings, layers = adapter_tensors(edit, rank)
    if settings != wanted_settings:
        return f"{ADAPTER_SETTINGS} is not that of the edit"
    if set(found) != set(wanted):
        return f"it holds {len(found)} tensors, and not the {len(wanted)} of the edit"
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
        elif _distance(mine, theirs) > CUT_TOLERANCE:
            return f"{module} is not the edit's, cut to rank {layer.rank}"
    return ""


def _distance(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """‖BA - B'A'‖ / ‖BA‖ of two adapters' factors."""
    product = mine[0].double() @ mine[1].double()
    return float((product - theirs[0].double() @ theirs[1].double()).norm() / product.norm().clamp(min=1e-300))
