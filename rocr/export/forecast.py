"""What an edit will read, hold and write, worked out from headers and shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from rocr.concepts import Concept
from rocr.config import EditConfig
from rocr.export.copying import may_link
from rocr.export.folder import carried_bytes, weights_copied
from rocr.export.originals import original_files
from rocr.keys.plan import KeyPlan
from rocr.model.architecture import Architecture, DownProjection
from rocr.model.load import ModelSource
from rocr.model.load_partial import must_map, needed_tensors
from rocr.model.stored_weights import StoredNames, find_stored, find_weights, stored_names
from rocr.model.weight_files import WeightFiles, stored_dtype

UNDO_SHARE = {torch.float32: 0.77, torch.bfloat16: 0.55, torch.float16: 0.73}
"""Bytes that undo an edit, compressed, over those of the weight: of updates of 2 to 35% of SmolLM2's weights 0.73 to
0.84, 0.45 to 0.67 and 0.64 to 0.84 were measured."""
HEADER_BYTES, HEADER_BYTES_OF_CONCEPT = 30_000, 600
BYTES_OF_TOKEN = 4
BATCH_TOKENS = {"statistics": 8192, "edit": 4096}
SAMPLED_TOKENS = 8192
CHECKED_TOKENS = 128
TOKENIZER_FILES = 4 * 2**20


@dataclass(frozen=True)
class Job:
    """An edit that is to be made.

    Attributes:
        source: where the model is.
        architecture: of the model; its parameters may be on the meta device.
        concepts: what is to be redirected.
        config: the settings, with the layers.
        plan: which tokens are read.
        parts: what is to be saved: of model, lora, edit, originals.
        out: where; None: not known yet.
        last_layer: the last layer that is loaded; None: the whole model.
        dtype: of the loaded weights; None: as they are stored.
        device: they are loaded to; None: the CPU.
        statistics: the file of statistics; None: they are collected.
        texts: what they are collected from; empty: the model's own text.
        tokens: of it at most.
        questions: asked before and after.
        answer_tokens: of each answer.
        lora_rank: the largest rank of the adapter.
    """

    source: ModelSource
    architecture: Architecture
    concepts: Sequence[Concept]
    config: EditConfig
    plan: KeyPlan
    parts: Sequence[str]
    out: Path | None = None
    last_layer: int | None = None
    dtype: torch.dtype | None = None
    device: str | None = None
    statistics: Path | None = None
    texts: Sequence[Path] = ()
    tokens: int | None = None
    questions: int = 0
    answer_tokens: int = 32
    lora_rank: int | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are edited."""
        assert self.config.layers is not None, "the layers are chosen before"
        return self.config.layers

    @property
    def weights(self) -> list[Tensor]:
        """The weights that are edited, (d_out, d_in)."""
        return [projection.weight for projection in self.projections]

    @property
    def keys(self) -> int:
        """Rows of keys at each layer."""
        return len(self.plan.concept_of)

    @cached_property
    def files(self) -> WeightFiles | None:
        """The model's safetensors files; None where it has none."""
        return find_weights(self.source)

    @cached_property
    def names(self) -> StoredNames:
        """How the model's parameters are called in its files."""
        return StoredNames() if self.files is None else stored_names(self.files, self.architecture.model)

    @property
    def projections(self) -> list[DownProjection]:
        """The down-projections that are edited."""
        return [self.architecture.down_projection(layer) for layer in self.layers]

    def text_tokens(self) -> int:
        """Tokens that the statistics are collected on."""
        if not self.texts:
            return self.tokens or SAMPLED_TOKENS
        found = sum(text.stat().st_size for text in self.texts) // BYTES_OF_TOKEN
        return min(found, self.tokens or found)


@dataclass(frozen=True)
class Forecast:
    """Bytes of an edit, part by part.

    Attributes:
        read: from the disk.
        held: in memory at the worst moment, on top of what the process holds already.
        mapped: of weights that stay in the pages of their files, which the system drops where memory is short.
        written: to the disk.
        linked: files of the output that are hard links and take no room.
        worst: the stage at which most is held.
    """

    read: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    mapped: int = 0
    written: dict[str, int] = field(default_factory=dict)
    linked: int = 0
    worst: str = ""


def forecast(job: Job) -> Forecast:
    """Work out what an edit reads, holds and writes."""
    written, linked, copied = _written(job)
    read = {"model": loaded_bytes(job)} | _text_bytes(job)
    if job.statistics is not None:
        read["statistics"] = job.statistics.stat().st_size
    if copied:
        read["weights copied to the output"] = copied
    read["sha256 of what was written"] = sum(written.values())
    if "originals" in job.parts:
        read["sha256 of the originals"] = sum(path.stat().st_size for path in original_files(job.source))
    stages = _stages(job)
    worst = max(stages, key=lambda stage: stages[stage])
    model, mapped = held_bytes(job), is_mapped(job)
    held = {"model": 0 if mapped else model, "second moments": sum(4 * w.shape[1] ** 2 for w in job.weights)}
    held[f"while: {worst}"] = stages[worst]
    return Forecast(read, held, model if mapped else 0, written, linked, worst)


def is_mapped(job: Job) -> bool:
    """Whether the model's weights stay in the pages of their files."""
    files = job.files
    if files is None or job.last_layer is None:
        return False
    return must_map(files, job.architecture, job.last_layer, job.device)


def loaded_bytes(job: Job) -> int:
    """Bytes of the model's files that are read to load it."""
    files = job.files
    if files is None:
        path = None if job.source.folder is None else job.source.folder / (job.source.gguf or "")
        return path.stat().st_size if path is not None and path.is_file() else held_bytes(job)
    if job.last_layer is None:
        return files.size
    return sum(tensor.size for tensor in needed_tensors(files, job.architecture, job.last_layer))


def held_bytes(job: Job) -> int:
    """Bytes of the loaded weights."""
    files = job.files
    if files is not None and job.last_layer is not None:
        return sum(tensor.size for tensor in needed_tensors(files, job.architecture, job.last_layer))
    if files is not None and job.dtype is None:
        return files.size
    return sum(parameter.numel() for parameter in job.architecture.model.parameters()) * weight_dtype(job).itemsize


def weight_dtype(job: Job) -> torch.dtype:
    """Of the edited weights, once they are loaded."""
    files = job.files
    if job.dtype is not None or files is None:
        return job.dtype or torch.float32
    if job.last_layer is None:
        return stored_dtype(files) or job.weights[0].dtype
    needed = needed_tensors(files, job.architecture, job.last_layer)
    return stored_dtype(files, [stored.name for stored in needed]) or job.weights[0].dtype


def written_dtype(job: Job) -> torch.dtype:
    """Of the edited weights, as they are written and undone."""
    if job.files is None or "model" not in job.parts:
        return weight_dtype(job)
    return find_stored(job.files, job.names, job.projections[0])[0].dtype


def edit_bytes(job: Job, undo: bool = True) -> int:
    """Bytes of the edit file, whose undo record is estimated; see `UNDO_SHARE`."""
    n, dtype = job.keys, written_dtype(job)
    size = HEADER_BYTES + HEADER_BYTES_OF_CONCEPT * len(job.concepts)
    for weight in job.weights:
        d_out, d_in = weight.shape
        factors = n * (d_out + d_in) if n <= d_in else d_out * d_in
        size += 4 * (factors + n * (d_out + d_in) + min(n, d_in) * d_in)
        size += int(UNDO_SHARE[dtype] * weight.numel() * dtype.itemsize) if undo else 0
    return size


def _written(job: Job) -> tuple[dict[str, int], int, int]:
    """Bytes by part; how many files are links; how many bytes of weights are copied."""
    written: dict[str, int] = {}
    linked = copied = 0
    if "model" in job.parts:
        files = job.files
        if files is None:
            written["model"] = held_bytes(job)
            written["configuration and tokenizer"] = TOKENIZER_FILES
        else:
            anew = weights_copied(files, job.names, job.projections, job.out)
            linked = len([name for name in files.files if name not in anew])
            copied = written["model"] = sum((files.folder / name).stat().st_size for name in anew)
            index = sum(len(name) + 60 for name in files.file_of)
            written["configuration and tokenizer"] = carried_bytes(files.folder) + index
    if "edit" in job.parts:
        written["edit"] = edit_bytes(job)
    if "lora" in job.parts:
        ranks = [min(job.keys, *weight.shape, job.lora_rank or job.keys) for weight in job.weights]
        written["adapter"] = sum(4 * r * sum(w.shape) for r, w in zip(ranks, job.weights, strict=True))
    if "originals" in job.parts:
        paths = original_files(job.source)
        links = job.source.folder is not None and may_link(job.source.folder, job.out)
        written["originals"] = 0 if links else sum(path.stat().st_size for path in paths)
    written["report and model card"] = HEADER_BYTES // 3 + HEADER_BYTES_OF_CONCEPT * len(job.concepts)
    return written, linked, copied


def _text_bytes(job: Job) -> dict[str, int]:
    """Text is read once for its sha256, and once more as far as it is used."""
    if job.statistics is not None or not job.texts:
        return {}
    size = sum(text.stat().st_size for text in job.texts)
    return {"text": size + min(size, job.text_tokens() * BYTES_OF_TOKEN)}


def _stages(job: Job) -> dict[str, int]:
    """Bytes that each stage needs besides the model and the second moments."""
    itemsize, n = weight_dtype(job).itemsize, job.keys
    weights = [weight.numel() for weight in job.weights]
    d_in = max(weight.shape[1] for weight in job.weights)
    edit = edit_bytes(job, undo=False) + sum(weights) * itemsize
    wide = 3 * 8 * d_in**2 if n > d_in else 4 * 8 * n**2
    solving = max(2 * 4 * d_in**2 + wide, max(weights) * (4 + itemsize)) + 8 * n * d_in
    found = {
        "edit": edit + max(solving, _batch(job, BATCH_TOKENS["edit"])) + _logits(job, CHECKED_TOKENS),
        "save": edit + 2 * edit_bytes(job),
    }
    if job.statistics is None:
        found["statistics"] = _batch(job, min(BATCH_TOKENS["statistics"], job.text_tokens()))
    if job.questions:
        found["answers"] = _batch(job, 64 * job.questions) + _logits(job, job.questions)
    if "model" in job.parts and job.files is None:
        found["save"] += held_bytes(job)
    return found


def _batch(job: Job, tokens: int) -> int:
    """Bytes of a layer's states of a batch: the MLP's inner ones, and those of attention and residual stream.

    How many of each are held at once was measured on SmolLM2-135M: 600 MB for 8,192 tokens in float32.
    """
    d_out, d_in = job.weights[0].shape
    return tokens * (6 * d_in + 16 * d_out) * 4


def _logits(job: Job, tokens: int) -> int:
    if job.last_layer is not None:
        return 0
    embedding = job.architecture.embedding
    assert isinstance(embedding, nn.Module)
    return 3 * 4 * tokens * int(embedding.weight.shape[0])  # type: ignore[index]
