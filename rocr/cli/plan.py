"""`--dry-run`: what would be read, edited and written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rocr.architectures import Architecture, default_layers, find_architecture
from rocr.cli.console import Console
from rocr.concepts import Concept
from rocr.errors import InputError

if TYPE_CHECKING:
    from rocr.config import EditConfig
    from rocr.models import ModelSource


@dataclass(frozen=True)
class Plan:
    """Sizes of an edit, in bytes, worked out from the model's configuration alone."""

    layers: tuple[int, ...]
    edited: list[str]
    parameters: int
    statistics: int


def show_plan(
    arguments: argparse.Namespace,
    concepts: Sequence[Concept],
    source: ModelSource,
    config: EditConfig,
    save: tuple[str, ...],
    console: Console,
) -> dict[str, Any]:
    """Show what `rocr unlearn` would do; nothing is loaded and nothing written."""
    plan = _plan(source, config, arguments.trust_remote_code)
    rows = [
        ("model", f"{source.name}: {plan.parameters:,} parameters"),
        ("concepts", f"{len(concepts)}, with {sum(len(concept.names) for concept in concepts)} names"),
        ("layers", ", ".join(map(str, plan.layers))),
        ("edited weights", "\n".join(plan.edited)),
        ("statistics", arguments.statistics or _gigabytes(plan.statistics) + " while they are collected"),
        ("written", f"{', '.join(save)} and report.json in {arguments.out or 'no folder yet: --out is missing'}"),
    ]
    console.table("Dry run: nothing is loaded, nothing is written", ("what", "how much"), rows)
    return {"dry_run": True, **dict(rows)}


def _plan(source: ModelSource, config: EditConfig, trust_remote_code: bool) -> Plan:
    architecture = _empty_model(source, trust_remote_code)
    layers = config.layers or default_layers(architecture.depth)
    projections = [architecture.down_projection(layer) for layer in layers]
    return Plan(
        layers,
        [f"{p.parameter_name} {tuple(p.weight.shape)}" for p in projections],
        sum(parameter.numel() for parameter in architecture.model.parameters()),
        sum(4 * p.weight.shape[1] ** 2 for p in projections),
    )


def _empty_model(source: ModelSource, trust_remote_code: bool) -> Architecture:
    """The model's structure without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rocr.model_folder import check_model_folder
    from rocr.models import offline

    place = source.name if source.folder is None else str(source.folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf:
        options["gguf_file"] = source.gguf
    if source.folder is None:
        options["local_files_only"] = not source.download
    elif source.gguf is None:
        check_model_folder(source.folder)
    try:
        with offline(unless=source.download), torch.device("meta"):
            config = AutoConfig.from_pretrained(place, **options)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # configurations of others raise whatever they like
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise InputError(f"{source.name} cannot be read: {reason}") from error
    return find_architecture(model)


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
