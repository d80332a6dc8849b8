"""Write an output folder: the model, what undoes and repeats the edit, an adapter, a report and a model card."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rocr.cli.console import Console
from rocr.io.output import new_directory

if TYPE_CHECKING:
    from rocr.edit.edit import Edit
    from rocr.export.report import Answer
    from rocr.model.load import LoadedModel

EDIT_FILE = "edit.safetensors"


def write_output(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    edit: Edit,
    parts: Sequence[str],
    console: Console,
    answers: Sequence[Answer] = (),
    reverted: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Write --out, complete or not at all, and return its report.

    Args:
        arguments: of the command.
        loaded: the model; see `rocr.export.folder.save_edited`.
        edit: what was done to it, or undone.
        parts: of model, lora, edit, originals.
        console: what timed the stages before.
        answers: before and after.
        reverted: whether the edit is taken off.
        more: further fields of the report.
    """
    from rocr.export.folder import Saved, save_edited
    from rocr.export.manifest import write_records
    from rocr.export.model_card import write_card
    from rocr.export.originals import save_originals
    from rocr.export.report import build_report
    from rocr.model.own_names import own_names

    with (
        console.stage("save"),
        new_directory(arguments.out, inputs=loaded.source.inputs, overwrite=arguments.overwrite) as partial,
    ):
        if "edit" in parts or "lora" in parts:
            edit = edit.with_own_names(own_names(loaded, [update.parameter for update in edit.updates]))
        saved = save_edited(loaded, edit, partial, reverted) if "model" in parts else Saved(edit, [], {})
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
    """Say where files and loaded model are not the same."""
    other = [weight for weight in report.get("weights", ()) if weight["loaded"] not in (weight["dtype"], None)]
    if other:
        console.warn(
            f"The files hold {other[0]['parameter']} as {other[0]['dtype']}, loaded as {other[0]['loaded']}: the "
            f"output keeps {other[0]['dtype']}."
        )
    left_out = report.get("left_out")
    if left_out:
        shown = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        console.warn(f"Weights that are not loaded with the model are not in the output: {shown}.")


def show_adapter(report: dict[str, Any], console: Console) -> None:
    """Show an adapter's ranks, what a smaller rank left out, and what vLLM has to be told."""
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
    console.table("LoRA adapter", ("layer", "rank", "left out of the update", "left out at the keys"), rows)
    rank = max(layer["rank"] for layer in layers)
    allowed = vllm_rank(rank)
    if allowed is None:
        console.warn(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: give --lora-rank.")
    elif allowed > VLLM_DEFAULT_RANK:
        console.say(f"vLLM takes ranks up to {VLLM_DEFAULT_RANK} unless it is told: --max-lora-rank {allowed}.")
