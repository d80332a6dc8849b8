"""Write an output folder: the model, the edit, an adapter, a report and a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments
from rocr.errors import InputError
from rocr.io.output import new_directory

if TYPE_CHECKING:
    from rocr.edit.edit import Edit
    from rocr.export.report import Answer
    from rocr.model.load import LoadedModel, ModelSource

EDIT_FILE = "edit.safetensors"
WRITTEN_BESIDE = (EDIT_FILE, "lora/adapter_model.safetensors", "replaced.safetensors")
"""What rocr writes beside an edited model, and an output made from that folder is expected to lack."""
LARGE_KEY_ERROR = 0.1
"""Error at the keys from which a GGUF output is warned about: Q8_0 has less than 1% for updates of some strength."""


def check_parts(arguments: Arguments, source: ModelSource) -> None:
    """Check, before a model is loaded, that the parts of --save fit the model and the other options.

    Raises:
        InputError: they do not.
    """
    parts = set(arguments.save)
    if arguments.lora_rank and not {"lora", "gguf-lora"} & parts:
        raise InputError("--lora-rank applies to adapters: add lora or gguf-lora to --save.")
    if arguments.gguf_type and "gguf" not in parts:
        raise InputError("--gguf-type applies to a .gguf output: add gguf to --save.")
    if "model" in parts:
        from rocr.export.copying import check_carried

        check_carried(source)
    for part in sorted({"gguf", "gguf-lora"} & parts):
        from rocr.export.gguf import gguf_path
        from rocr.model.gguf_layout import read_gguf_layout

        read_gguf_layout(gguf_path(source, part))
    if "originals" in parts:
        from rocr.export.originals import original_files

        original_files(source)


def check_writable(arguments: Arguments, loaded: LoadedModel, layers: Sequence[int]) -> None:
    """Check, before a loaded model is edited, that its edited form can be written to --out.

    Raises:
        InputError: it cannot.
    """
    from rocr.export.folder import check_output_possible
    from rocr.export.gguf import check_gguf_possible
    from rocr.export.quantised import PLAIN

    if "model" in arguments.save:
        check_output_possible(loaded, layers, Path(arguments.out), getattr(arguments, "quantised", None) or PLAIN)
    if "gguf" in arguments.save:
        check_gguf_possible(loaded, layers, Path(arguments.out), gguf_kind(arguments))


def gguf_kind(arguments: Arguments) -> str | None:
    """The type of edited tensors in a .gguf output; None: their own if it can be written."""
    kind: str | None = getattr(arguments, "gguf_type", None)
    return kind and kind.upper()


def write_output(
    arguments: Arguments,
    loaded: LoadedModel,
    edit: Edit,
    parts: Sequence[str],
    console: Console,
    answers: Sequence[Answer] = (),
    reverted: bool = False,
    quantised: str | None = None,
    settings: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write the folder --out, completely or not at all.

    Args:
        arguments: of the command.
        loaded: the model; see `rocr.saving.save_edited`.
        edit: the edit that was applied or reverted.
        parts: what to write, of model, gguf, lora, gguf-lora, edit, originals.
        console: has the seconds of the stages before.
        answers: answers before and after the edit.
        reverted: whether the edit was reverted.
        quantised: how edited weights of a quantised model are written; None: plain.
        settings: the options of the run as a file for --config; None: no such file.
        more: further fields of the report.

    Returns:
        The report.
    """
    from rocr.export.copying import SETTINGS_FILE
    from rocr.export.folder import Saved, save_edited
    from rocr.export.gguf import save_edited_gguf
    from rocr.export.gguf_lora import write_gguf_lora
    from rocr.export.manifest import write_records
    from rocr.export.model_card import write_card
    from rocr.export.originals import save_originals
    from rocr.export.quantised import PLAIN
    from rocr.export.report import build_report
    from rocr.model.own_names import own_names

    with (
        console.stage("save"),
        new_directory(arguments.out, inputs=loaded.source.inputs, overwrite=arguments.overwrite) as partial,
    ):
        if "edit" in parts or "lora" in parts:
            edit = edit.with_own_names(own_names(loaded, [update.parameter for update in edit.updates]))
        saved = Saved(edit, [], {})
        if "model" in parts:
            force = bool(getattr(arguments, "force", False))
            saved = save_edited(loaded, edit, partial, reverted, quantised or PLAIN, force, undo="edit" in parts)
        elif "gguf" in parts:
            saved = save_edited_gguf(loaded, edit, partial, reverted, gguf_kind(arguments))
        edit, linked = saved.edit, saved.linked
        if "edit" in parts:
            edit.save(partial / EDIT_FILE)
        adapter = edit.export_lora(partial / "lora", arguments.lora_rank) if "lora" in parts else []
        if "gguf-lora" in parts:
            depth = loaded.architecture.depth
            adapter = write_gguf_lora(edit, loaded.source, depth, partial, arguments.lora_rank)
        stored = save_originals(loaded.source, partial) if "originals" in parts else {}
        report = build_report(edit, arguments.model, console.seconds, answers, {}, linked) | saved.report | more
        if adapter:
            report["lora"] = [asdict(layer) for layer in adapter]
        if settings is not None:
            (partial / SETTINGS_FILE).write_text(settings, encoding="utf-8", newline="\n")
        write_card(report, loaded.source, parts, partial)
        write_records(report, partial, stored)
    _say_what_differs(report, console)
    return report


def _say_what_differs(report: dict[str, Any], console: Console) -> None:
    """Warn if the files hold other dtypes or other weights than the loaded model."""
    if "gguf" in report:
        _say_what_is_stored(report, console)
        return
    quantised = report.get("quantised")
    if quantised is not None:
        least = min(layer["surviving"] for layer in quantised["layers"])
        console.say(
            f"{quantised['scheme']}, --quantised {quantised['output']}: {least:.1%} of the update survives at the "
            "concepts' keys in the layer with the least."
        )
    other = [weight for weight in report.get("weights", ()) if weight["loaded"] not in (weight["dtype"], None)]
    if other and quantised is None:
        console.warn(
            f"{other[0]['parameter']} is stored as {other[0]['dtype']} and loaded as {other[0]['loaded']}: the output "
            f"keeps {other[0]['dtype']}."
        )
    left_out = [name for name in report.get("left_out") or () if name not in WRITTEN_BESIDE]
    if left_out:
        shown = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        console.warn(f"The output lacks weights that the model does not load: {shown}.")


def _say_what_is_stored(report: dict[str, Any], console: Console) -> None:
    """Show the types of the edited tensors of a GGUF file, and what rounding to them leaves of the update."""
    weights, size = report["weights"], report["gguf"]["bytes"]
    other = [weight for weight in weights if weight["dtype"] != weight["was"]]
    if other:
        console.say(
            f"{len(other)} of {len(weights)} edited tensors are stored in another type than before, such as "
            f"{other[0]['stored'][0]} as {other[0]['dtype']} instead of {other[0]['was']}: the file has "
            f"{size['after']:,} bytes instead of {size['before']:,}."
        )
    if any(weight["key_error"] is None for weight in weights):
        return  # the edit was reverted
    rows = [
        (
            str(weight["layer"]),
            weight["stored"][0],
            weight["dtype"],
            weight["was"],
            f"{100 * weight['surviving']:.1f}%",
            f"{100 * weight['key_error']:.2f}%",
        )
        for weight in weights
    ]
    console.table("Edited tensors", ("layer", "tensor", "type", "was", "values changed", "error at the keys"), rows)
    worst = max(weight["key_error"] for weight in weights)
    if worst > LARGE_KEY_ERROR:
        console.warn(
            f"Rounding to the stored type changes the update by up to {100 * worst:.0f}% at the concepts' keys: "
            "choose another type with --gguf-type f16, or write an adapter (--save gguf-lora)."
        )


def show_adapter(report: dict[str, Any], console: Console, out: str) -> None:
    """Show an adapter's ranks, its truncation errors, and the setting of vLLM that it needs."""
    from rocr.edit.lora import GGUF_SUFFIX, VLLM_DEFAULT_RANK, VLLM_RANKS, loading_call, vllm_rank

    layers = report.get("lora")
    if not layers:
        return
    rows = [
        (
            str(layer["layer"]),
            f"{layer['rank']} of {layer['full_rank']}",
            f"{100 * layer['relative_error']:.2f}%",
            f"{100 * layer['key_error']:.2f}%",
        )
        for layer in layers
    ]
    console.table("LoRA adapter", ("layer", "rank", "error of the update", "error at the keys"), rows)
    if not any(name.startswith("lora/") for name in report["files"]):
        return  # vLLM reads the PEFT adapter only
    name = report["fingerprint"]["name"]
    if name.endswith(GGUF_SUFFIX):
        call = loading_call(name, (Path(out) / "lora").as_posix())
        console.say(f"The base model is a GGUF file, whose name peft needs: {call}.")
    rank = max(layer["rank"] for layer in layers)
    allowed = vllm_rank(rank)
    if allowed is None:
        console.warn(f"vLLM supports ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: give --lora-rank.")
    elif allowed > VLLM_DEFAULT_RANK:
        console.say(f"vLLM supports ranks up to {VLLM_DEFAULT_RANK} by default: run it with --max-lora-rank {allowed}.")
