"""Write an output folder: the model, what undoes and repeats the edit, an adapter, a report and a model card."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rocr.cli.console import Console
from rocr.output import new_directory

if TYPE_CHECKING:
    from rocr.edit import Edit
    from rocr.models import LoadedModel
    from rocr.report import Answer

EDIT_FILE = "edit.safetensors"


def write_output(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    edit: Edit,
    parts: Sequence[str],
    console: Console,
    answers: Sequence[Answer] = (),
    **more: Any,
) -> dict[str, Any]:
    """Write --out, complete or not at all, and return its report.

    Args:
        arguments: of the command.
        loaded: the model as it is to be written.
        edit: what was done to it, or undone.
        parts: of model, lora, edit, originals.
        console: what timed the stages before.
        answers: before and after.
        more: further fields of the report.
    """
    from rocr.model_card import write_card
    from rocr.originals import save_originals
    from rocr.report import build_report, file_digests, write_report
    from rocr.saving import save_edited

    with (
        console.stage("save"),
        new_directory(arguments.out, inputs=loaded.source.inputs, overwrite=arguments.overwrite) as partial,
    ):
        linked = save_edited(loaded, edit, partial) if "model" in parts else []
        if "edit" in parts:
            edit.save(partial / EDIT_FILE)
        adapter = edit.export_lora(partial / "lora", arguments.lora_rank) if "lora" in parts else []
        stored = save_originals(loaded.source, partial) if "originals" in parts else {}
        report = build_report(edit, arguments.model, console.seconds, answers, {}, linked) | more
        if adapter:
            report["lora"] = [asdict(layer) for layer in adapter]
        write_card(report, loaded.source, parts, partial)
        report["files"] = file_digests(partial, [*linked, *stored]) | stored
        write_report(report, partial)
    return report


def show_adapter(report: dict[str, Any], console: Console) -> None:
    """Show an adapter's ranks, what a smaller rank left out, and what vLLM has to be told."""
    from rocr.lora import VLLM_DEFAULT_RANK, VLLM_RANKS, vllm_rank

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
