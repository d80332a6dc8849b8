"""Write an output folder: the model, the edit, an adapter, a report and a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rocr.cli.console import Console
from rocr.cli.parsing import Arguments
from rocr.io.output import new_directory

if TYPE_CHECKING:
    from rocr.edit.edit import Edit
    from rocr.export.report import Answer
    from rocr.model.load import LoadedModel

EDIT_FILE = "edit.safetensors"


def write_output(
    arguments: Arguments,
    loaded: LoadedModel,
    edit: Edit,
    parts: Sequence[str],
    console: Console,
    answers: Sequence[Answer] = (),
    reverted: bool = False,
    quantised: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write the folder --out, completely or not at all.

    Args:
        arguments: of the command.
        loaded: the model; see `rocr.saving.save_edited`.
        edit: the edit that was applied or reverted.
        parts: what to write, of model, lora, edit, originals.
        console: has the seconds of the stages before.
        answers: answers before and after the edit.
        reverted: whether the edit was reverted.
        quantised: how edited weights of a quantised model are written; None: plain.
        more: further fields of the report.

    Returns:
        The report.
    """
    from rocr.export.folder import Saved, save_edited
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
        edit, linked = saved.edit, saved.linked
        if "edit" in parts:
            edit.save(partial / EDIT_FILE)
        adapter = edit.export_lora(partial / "lora", arguments.lora_rank) if "lora" in parts else []
        stored = save_originals(loaded.source, partial) if "originals" in parts else {}
        report = build_report(edit, arguments.model, console.seconds, answers, {}, linked) | saved.report | more
        if adapter:
            report["lora"] = [asdict(layer) for layer in adapter]
        write_card(report, loaded.source, parts, partial)
        write_records(report, partial, stored)
    _say_what_differs(report, console)
    return report


def _say_what_differs(report: dict[str, Any], console: Console) -> None:
    """Warn if the files hold other dtypes or other weights than the loaded model."""
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
    left_out = report.get("left_out")
    if left_out:
        shown = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        console.warn(f"The output lacks weights that the model does not load: {shown}.")


def show_adapter(report: dict[str, Any], console: Console) -> None:
    """Show an adapter's ranks, its truncation errors, and the setting of vLLM that it needs."""
    from rocr.edit.lora import VLLM_DEFAULT_RANK, VLLM_RANKS, vllm_rank

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
    rank = max(layer["rank"] for layer in layers)
    allowed = vllm_rank(rank)
    if allowed is None:
        console.warn(f"vLLM supports ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: give --lora-rank.")
    elif allowed > VLLM_DEFAULT_RANK:
        console.say(f"vLLM supports ranks up to {VLLM_DEFAULT_RANK} by default: run it with --max-lora-rank {allowed}.")
