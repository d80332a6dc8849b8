"""`rocr plan` and `--dry-run`: estimate what a run reads, holds in memory and writes, and its seconds."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocr.cli.answers import retained_names
from rocr.cli.console import Console
from rocr.cli.outputs import gguf_kind
from rocr.cli.parsing import Arguments
from rocr.cli.recommend import added_options, recommended
from rocr.concepts import Concept

if TYPE_CHECKING:
    from rocr.config import EditConfig
    from rocr.export.forecast import Forecast, Job
    from rocr.model.load import ModelSource


def show_plan(
    arguments: Arguments,
    concepts: Sequence[Concept],
    source: ModelSource,
    config: EditConfig,
    questions: int,
    last_layer: int | None,
    console: Console,
) -> dict[str, Any]:
    """Show what `rocr unlearn` would do, without loading weights or writing files.

    Raises:
        InputError: the model or a name cannot be used, or there is too little free disk space.
    """
    from rocr.export.duration import DISK_BYTES_PER_SECOND, estimate_stages, measure_speed
    from rocr.export.forecast import forecast, weight_dtype
    from rocr.io.disk_space import check_space, free_space
    from rocr.model.load_partial import free_memory

    job = _job(arguments, concepts, source, config, questions, last_layer)
    sizes = forecast(job)
    speed = measure_speed(job.architecture, weight_dtype(job))
    stages = estimate_stages(job, speed, sizes)
    seconds = sum(stages.values())
    advice = recommended(arguments, concepts, job, stages["statistics"])
    free = {"memory": free_memory(), "disk": free_space(arguments.out or ".")}
    basis = (
        "The seconds are an estimate for the CPU, without the time to import libraries. Measured now: "
        f"{1e6 * speed.layer:,.1f} µs per token of one decoder layer ({weight_dtype(job)}, random weights), matrix "
        f"products at {speed.products / 1e9:,.0f} GFLOP/s in float32. Assumed: files at "
        f"{DISK_BYTES_PER_SECOND / 1e6:,.0f} MB/s."
    )
    loaded = "all of it" if last_layer is None else f"the embedding and the layers 0 to {last_layer}"
    rows = [
        ("model", f"{source.name}: {sum(p.numel() for p in job.architecture.model.parameters()):,} parameters"),
        ("concepts", _counted(concepts, job)),
        ("layers", ", ".join(map(str, job.layers))),
        ("edited weights", "\n".join([*_edited(job), *_kept_zeros(job)])),
        ("read", f"{_parts(sizes.read)}\nof the model: {loaded}"),
        ("held at most", f"{_parts(sizes.held)}\n{_mapped(sizes)}free now: {_bytes(free['memory'])}"),
        ("written", f"{_parts(sizes.written)}\nhard links: {sizes.linked}\nto {arguments.out or 'no folder yet'}"),
        ("seconds", f"{_about(seconds)}\n" + "\n".join(f"{name}: {_about(part)}" for name, part in stages.items())),
        *((f"recommended {each.about}", each.text) for each in advice),
    ]
    console.table("Dry run: no weights are loaded, nothing is written", ("what", "how much"), rows)
    console.say(basis)
    added = added_options(advice)
    if added:
        console.say(f"Recommended: add to the command line {shlex.join(added)}")
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
        "seconds": {"total": seconds},
        "seconds_of_stages": stages,
        "recommended": [each.to_json() for each in advice],
        "sparse": sum(job.sparse),
        "basis": basis,
    }


def _counted(concepts: Sequence[Concept], job: Job) -> str:
    """The numbers of concepts, names and keys."""
    of_variants = sum(job.plan.is_variant)
    return "\n".join(
        [
            f"{len(concepts):,}, with {sum(len(c.names) for c in concepts):,} names and {job.keys:,} keys",
            *([f"{of_variants:,} keys of other spellings (--variants)"] if of_variants else []),
            *(["not counted: aliases that the model proposes"] if job.config.variants == "all" else []),
        ]
    )


def _about(seconds: float) -> str:
    return f"about {seconds:,.0f}" if seconds >= 1 else "less than 1"


def _mapped(sizes: Forecast) -> str:
    """A line about weights that are mapped from their files."""
    return f"mapped from the model's files, cached as memory allows: {_bytes(sizes.mapped)}\n" if sizes.mapped else ""


def _job(
    arguments: Arguments,
    concepts: Sequence[Concept],
    source: ModelSource,
    config: EditConfig,
    questions: int,
    last_layer: int | None,
) -> Job:
    import dataclasses

    import transformers

    from rocr.edit.controls import kept_names
    from rocr.edit.retained_keys import expected_keys
    from rocr.edit.task import with_variants
    from rocr.export.forecast import Job
    from rocr.export.quantised import PLAIN
    from rocr.io.dtypes import torch_dtype
    from rocr.keys.plan import plan_keys
    from rocr.model.architecture import find_architecture, positions_of
    from rocr.model.causality import kind_by_class
    from rocr.model.check_folder import check_model_folder
    from rocr.model.layers import chosen_layers
    from rocr.model.load import load_tokenizer
    from rocr.model.load_partial import empty_model

    transformers.utils.logging.disable_progress_bar()
    if source.checkpoint_folder is not None:
        check_model_folder(source.checkpoint_folder)
    architecture = find_architecture(empty_model(source, arguments.trust_remote_code))
    architecture = dataclasses.replace(architecture, kind=kind_by_class(architecture.model))
    config = with_variants(dataclasses.replace(config, layers=chosen_layers(config, architecture)), architecture)
    tokenizer = load_tokenizer(source, arguments.trust_remote_code)
    control = retained_names(arguments, concepts)
    kept, positions = kept_names(control), positions_of(architecture.model)
    plan = plan_keys(tokenizer, concepts, config, architecture.kind, kept=kept, positions=positions)
    return Job(
        source,
        architecture,
        concepts,
        config,
        plan,
        arguments.save,
        Path(arguments.out) if arguments.out else None,
        last_layer,
        torch_dtype(arguments.dtype) if arguments.dtype else None,
        arguments.device,
        Path(arguments.statistics) if arguments.statistics else None,
        [Path(text) for text in arguments.text],
        arguments.tokens,
        questions,
        arguments.answer_tokens,
        arguments.lora_rank,
        gguf_kind(arguments),
        arguments.quantised or PLAIN,
        expected_keys(tokenizer, concepts, config, control, architecture.kind),
    )


def _edited(job: Job) -> list[str]:
    counts = Counter((block.parameter_name, tuple(block.weight.shape)) for block in job.blocks)
    return [f"{name} {shape}" + (f", {count} experts" if count > 1 else "") for (name, shape), count in counts.items()]


def _kept_zeros(job: Job) -> list[str]:
    """A line about the zeros that the edit keeps."""
    count = sum(job.sparse)
    return [f"zeros are kept in {count} of {len(job.sparse)}"] if count else []


def _parts(sizes: Mapping[str, int]) -> str:
    parts = (f"{part}: {_bytes(size)}" for part, size in sizes.items())
    return "\n".join([_bytes(sum(sizes.values())), *parts])


def _bytes(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
