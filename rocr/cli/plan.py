"""`--dry-run`: what would be read, held and written, and about how long it takes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.console import Console
from rocr.concepts import Concept

if TYPE_CHECKING:
    from rocr.config import EditConfig
    from rocr.export.forecast import Forecast, Job
    from rocr.model.load import ModelSource


def show_plan(
    arguments: argparse.Namespace,
    concepts: Sequence[Concept],
    source: ModelSource,
    config: EditConfig,
    save: tuple[str, ...],
    questions: int,
    last_layer: int | None,
    console: Console,
) -> dict[str, Any]:
    """Show what `rocr unlearn` would do; no weights are loaded and nothing is written.

    Raises:
        InputError: the model or a name cannot be used, or the disk is too small.
    """
    from rocr.export.forecast import forecast, weight_dtype
    from rocr.export.speed import DISK_BYTES_PER_SECOND, estimate_seconds, measure_speed
    from rocr.io.disk_space import check_space, free_space
    from rocr.model.load_partial import free_memory

    job = _job(arguments, concepts, source, config, save, questions, last_layer)
    sizes = forecast(job)
    speed = measure_speed(job.architecture, weight_dtype(job))
    seconds = estimate_seconds(job, speed, sizes)
    free = {"memory": free_memory(), "disk": free_space(arguments.out or ".")}
    basis = (
        f"An estimate for the CPU. Measured now: {1e6 * speed.layer:,.1f} µs a token of one decoder layer "
        f"({weight_dtype(job)}, made-up weights), {speed.products / 1e9:,.0f} GFLOP/s in float32, memory at "
        f"{speed.memory / 1e9:,.1f} GB/s. Assumed: files at {DISK_BYTES_PER_SECOND / 1e6:,.0f} MB/s."
    )
    loaded = "all of it" if last_layer is None else f"the embedding and the layers 0 to {last_layer}"
    rows = [
        ("model", f"{source.name}: {sum(p.numel() for p in job.architecture.model.parameters()):,} parameters"),
        ("concepts", f"{len(concepts)}, with {sum(len(c.names) for c in concepts)} names and {job.keys:,} keys"),
        ("layers", ", ".join(map(str, job.layers))),
        ("edited weights", "\n".join(_edited(job))),
        ("read", f"{_parts(sizes.read)}\nof the model: {loaded}"),
        ("held at most", f"{_parts(sizes.held)}\n{_mapped(sizes)}free now: {_bytes(free['memory'])}"),
        ("written", f"{_parts(sizes.written)}\nhard links: {sizes.linked}\nto {arguments.out or 'no folder yet'}"),
        ("seconds", "\n".join([f"{sum(seconds.values()):,.1f}", *(f"{s}: {v:,.1f}" for s, v in seconds.items())])),
    ]
    console.table("Dry run: no weights are loaded, nothing is written", ("what", "how much"), rows)
    console.say(basis)
    if sum(sizes.held.values()) > (free["memory"] or 0):
        console.warn("More memory may be needed than is free now.")
    if arguments.out:
        check_space(arguments.out, sum(sizes.written.values()))
    return {
        "dry_run": True,
        "layers": list(job.layers),
        "edited": _edited(job),
        "keys": job.keys,
        "read": sizes.read,
        "held": sizes.held,
        "mapped": sizes.mapped,
        "written": sizes.written,
        "linked": sizes.linked,
        "free": free,
        "seconds": seconds,
        "basis": basis,
    }


def _mapped(sizes: Forecast) -> str:
    """A line about weights that stay in the pages of their files."""
    return f"in the model's own files, in memory as far as it goes: {_bytes(sizes.mapped)}\n" if sizes.mapped else ""


def _job(
    arguments: argparse.Namespace,
    concepts: Sequence[Concept],
    source: ModelSource,
    config: EditConfig,
    save: tuple[str, ...],
    questions: int,
    last_layer: int | None,
) -> Job:
    import dataclasses

    import transformers

    from rocr.export.forecast import Job
    from rocr.io.dtypes import torch_dtype
    from rocr.keys.plan import plan_keys
    from rocr.model.architecture import find_architecture
    from rocr.model.check_folder import check_model_folder
    from rocr.model.layers import chosen_layers
    from rocr.model.load import load_tokenizer
    from rocr.model.load_partial import empty_model

    transformers.utils.logging.disable_progress_bar()
    if source.checkpoint_folder is not None:
        check_model_folder(source.checkpoint_folder)
    architecture = find_architecture(empty_model(source, arguments.trust_remote_code))
    config = dataclasses.replace(config, layers=chosen_layers(config, architecture))
    tokenizer = load_tokenizer(source, arguments.trust_remote_code)
    return Job(
        source,
        architecture,
        concepts,
        config,
        plan_keys(tokenizer, concepts, config),
        save,
        Path(arguments.out) if arguments.out else None,
        last_layer,
        torch_dtype(arguments.dtype) if arguments.dtype else None,
        arguments.device,
        Path(arguments.statistics) if arguments.statistics else None,
        [Path(text) for text in arguments.text or ()],
        arguments.tokens,
        questions,
        arguments.answer_tokens,
        arguments.lora_rank,
    )


def _edited(job: Job) -> list[str]:
    found = [job.architecture.down_projection(layer) for layer in job.layers]
    return [f"{projection.parameter_name} {tuple(projection.weight.shape)}" for projection in found]


def _parts(sizes: Mapping[str, int]) -> str:
    parts = (f"{part}: {_bytes(size)}" for part, size in sizes.items())
    return "\n".join([_bytes(sum(sizes.values())), *parts])


def _bytes(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
