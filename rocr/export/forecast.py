"""Estimate what an edit reads, holds in memory and writes, from headers and shapes, without loading a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from rocr.concepts import Concept
from rocr.config import EditConfig
from rocr.edit.support import SPARSE
from rocr.errors import InputError
from rocr.export.copying import may_link
from rocr.export.folder import carried_bytes, weights_copied
from rocr.export.gguf import first_bytes, gguf_bytes
from rocr.export.originals import original_files
from rocr.export.quantised import PLAIN
from rocr.keys.plan import KeyPlan
from rocr.model.architecture import Architecture
from rocr.model.block import Block
from rocr.model.blocks import find_blocks
from rocr.model.load import ModelSource
from rocr.model.load_partial import bytes_in_memory, must_map, needed_tensors
from rocr.model.quantised.checkpoint import find_quantisation
from rocr.model.stored_names import StoredNames, stored_names
from rocr.model.stored_weights import find_quantised, find_stored, find_weights, replaced_weights
from rocr.model.weight_files import WeightFiles, stored_dtype

UNDO_SHARE = {torch.float32: 0.77, torch.bfloat16: 0.55, torch.float16: 0.73}
"""Size of the compressed undo data over that of the weight. For updates of 2 to 35% of the norm of SmolLM2's weights,
0.73 to 0.84, 0.45 to 0.67 and 0.64 to 0.84 were measured."""
HEADER_BYTES, HEADER_BYTES_OF_CONCEPT = 30_000, 600
SAMPLED_BYTES = 2**22
"""Bytes at the beginning of a weight by which a sparse weight is told."""
BYTES_OF_TOKEN = 4
"""Assumed bytes of text per token."""
BATCH_TOKENS = {"statistics": 8192, "edit": 4096}
SAMPLED_TOKENS = 8192
"""Tokens of text that the model writes for statistics without a text."""
CHECKED_TOKENS = 128
"""Tokens of the prose on which predictions before and after the edit are compared."""
TOKENIZER_FILES = 4 * 2**20
"""Assumed bytes of configuration and tokenizer of a model without a folder."""


@dataclass(frozen=True)
class Job:
    """An edit to be estimated.

    Attributes:
        source: Location of the model.
        architecture: The model; its parameters may be on the meta device.
        concepts: The concepts.
        config: The settings, with layers.
        plan: The tokens to read.
        parts: The parts to save, of model, gguf, lora, gguf-lora, edit, originals.
        out: The output folder. None if it is not known yet.
        last_layer: The last layer to load. None loads the whole model.
        dtype: Dtype to load the weights in. None loads them as stored.
        device: Device to load the weights to. None is the CPU.
        statistics: The file of statistics. None collects them.
        texts: Texts to collect statistics from. Empty uses text that the model writes.
        tokens: Largest number of tokens to collect statistics from.
        questions: Number of questions to ask before and after the edit.
        answer_tokens: Number of tokens of each answer.
        lora_rank: Largest rank of the adapter.
        gguf_kind: Type of the edited tensors in a GGUF output. None keeps theirs.
        quantised: How edited weights of a quantised model are written, "plain" or "keep".
        retained_keys: Expected number of keys of retained names at each layer.
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
    gguf_kind: str | None = None
    quantised: str = PLAIN
    retained_keys: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to edit."""
        assert self.config.layer_numbers, "the config has layers"
        return self.config.layer_numbers

    @property
    def weights(self) -> list[Tensor]:
        """The weights to edit, (d_out, d_in)."""
        return [block.weight for block in self.blocks]

    @property
    def keys(self) -> int:
        """Number of keys at each layer."""
        return len(self.plan.concept_of)

    @cached_property
    def files(self) -> WeightFiles | None:
        """The model's safetensors files. None if it has none."""
        return find_weights(self.source)

    @cached_property
    def names(self) -> StoredNames:
        """The names of the model's parameters in its files."""
        return StoredNames() if self.files is None else stored_names(self.files, self.architecture.model)

    @cached_property
    def sparse(self) -> list[bool]:
        """Whether the edit keeps the zeros of each weight, by the beginning of the weight in its file."""
        if self.config.keep_zeros is False or (self.files is not None and find_quantisation(self.files.folder)):
            return [False] * len(self.blocks)
        if self.files is None:  # a GGUF file: only what is asked for is known
            return [bool(self.config.keep_zeros)] * len(self.blocks)
        least = 0.0 if self.config.keep_zeros else SPARSE
        return [_share_of_zeros(self.files, self.names, block) > least for block in self.blocks]

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the layers to edit."""
        return [block for layer in find_blocks(self.architecture, self.layers).values() for block in layer.blocks]

    def text_tokens(self) -> int:
        """Return the number of tokens to collect statistics from."""
        if not self.texts:
            return self.tokens or SAMPLED_TOKENS
        found = sum(text.stat().st_size for text in self.texts) // BYTES_OF_TOKEN
        return min(found, self.tokens or found)


@dataclass(frozen=True)
class Forecast:
    """Sizes of an edit in bytes, by part.

    Attributes:
        read: Bytes read from the disk.
        held: Bytes held in memory at the peak, on top of what the process holds already.
        mapped: Bytes of weights that are mapped from their files, which the system drops if memory is short.
        written: Bytes written to the disk.
        linked: Number of files of the output that are hard links and take no disk space.
    """

    read: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    mapped: int = 0
    written: dict[str, int] = field(default_factory=dict)
    linked: int = 0


def forecast(job: Job) -> Forecast:
    """Return the sizes of an edit."""
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
    peak = max(stages, key=lambda stage: stages[stage])
    model, mapped = held_bytes(job), is_mapped(job)
    held = {"model": 0 if mapped else model, "second moments": sum(4 * w.shape[1] ** 2 for w in job.weights)}
    held[f"during {peak}"] = stages[peak]
    return Forecast(read, held, model if mapped else 0, written, linked)


def is_mapped(job: Job) -> bool:
    """Return whether the model's weights are mapped from their files."""
    files = job.files
    if files is None or job.last_layer is None:
        return False
    return must_map(files, job.architecture, job.last_layer, job.device)


def loaded_bytes(job: Job) -> int:
    """Return the number of bytes of the model's files that are read to load it."""
    files = job.files
    if files is None:
        path = None if job.source.folder is None else job.source.folder / (job.source.gguf or "")
        return path.stat().st_size if path is not None and path.is_file() else held_bytes(job)
    if job.last_layer is None:
        return files.size
    return sum(tensor.size for tensor in needed_tensors(files, job.architecture, job.last_layer))


def held_bytes(job: Job) -> int:
    """Return the size of the loaded weights in bytes."""
    files = job.files
    if files is not None and job.last_layer is not None:
        return bytes_in_memory(files, job.architecture, job.last_layer)
    quantisation = None if files is None else find_quantisation(files.folder)
    is_dequantised = quantisation is not None and quantisation.scheme.can_dequantise
    if files is not None and job.dtype is None and not is_dequantised:
        return files.size
    return sum(parameter.numel() for parameter in job.architecture.model.parameters()) * weight_dtype(job).itemsize


def weight_dtype(job: Job) -> torch.dtype:
    """Return the dtype of the edited weights after loading."""
    files = job.files
    if job.dtype is not None or files is None:
        return job.dtype or torch.float32
    quantisation = find_quantisation(files.folder)
    if quantisation is not None:
        return quantisation.dtype
    if job.last_layer is None:
        return stored_dtype(files) or job.weights[0].dtype
    needed = needed_tensors(files, job.architecture, job.last_layer)
    return stored_dtype(files, [stored.name for stored in needed]) or job.weights[0].dtype


def written_dtype(job: Job) -> torch.dtype:
    """Return the dtype in which the edited weights are written."""
    if job.files is None or "model" not in job.parts:
        return weight_dtype(job)
    quantisation = find_quantisation(job.files.folder)
    if quantisation is not None and find_quantised(job.names, job.blocks[0]) is not None:
        return quantisation.dtype
    return find_stored(job.files, job.names, job.blocks[0])[0].dtype


def edit_bytes(job: Job, undo: bool = True) -> int:
    """Return the estimated size of the edit file in bytes, with or without the undo data; see `UNDO_SHARE`."""
    n, retained, dtype = job.keys, job.retained_keys, written_dtype(job)
    size = HEADER_BYTES + HEADER_BYTES_OF_CONCEPT * len(job.concepts)
    for weight, is_sparse in zip(job.weights, job.sparse, strict=True):
        d_out, d_in = weight.shape
        factors = n * (d_out + d_in) if n <= d_in else d_out * d_in
        if is_sparse:
            factors = (n + retained) * (d_out + d_in)
            size += d_out * -(-d_in // 8)  # a bit for each element that is not zero
        size += 4 * (factors + n * (d_out + d_in) + min(n, d_in) * d_in + retained * d_in * (2 if n <= d_in else 1))
        size += int(UNDO_SHARE[dtype] * weight.numel() * dtype.itemsize) if undo else 0
    return size


def _share_of_zeros(files: WeightFiles, names: StoredNames, block: Block) -> float:
    """Return the share of exact zeros in the first values of a weight in its file."""
    try:
        stored = find_stored(files, names, block)[0].tensor
    except InputError:
        return 0.0  # stored in another layout: what the run writes then says so
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        data = bytearray(file.read(min(stored.size, SAMPLED_BYTES)))
    values = torch.frombuffer(data, dtype=stored.dtype)
    return float((values == 0).double().mean())


def _written(job: Job) -> tuple[dict[str, int], int, int]:
    """Return the bytes written by part, the number of links, and the bytes of weights that are copied."""
    written: dict[str, int] = {}
    linked = copied = 0
    if "model" in job.parts:
        files = job.files
        if files is None:
            written["model"] = held_bytes(job)
            written["configuration and tokenizer"] = TOKENIZER_FILES
        else:
            anew = weights_copied(files, job.names, job.blocks, job.out)
            linked = len([name for name in files.files if name not in anew])
            copied = written["model"] = sum((files.folder / name).stat().st_size for name in anew)
            growth, replaced = _replaced_bytes(job)
            written["model"] += growth
            if replaced:
                written["replaced tensors"] = replaced
            index = sum(len(name) + 60 for name in files.file_of)
            written["configuration and tokenizer"] = carried_bytes(files.folder) + index
    if "gguf" in job.parts:
        copied = written["GGUF file"] = gguf_bytes(job.source, job.blocks, job.architecture.depth, job.gguf_kind)
    if "edit" in job.parts:
        written["edit"] = edit_bytes(job)
        if "gguf" in job.parts:
            written["edit"] += first_bytes(job.source, job.blocks, job.architecture.depth, job.gguf_kind)
    for part, name in (("lora", "adapter"), ("gguf-lora", "GGUF adapter")):
        if part in job.parts:
            ranks = [min(job.keys, *weight.shape, job.lora_rank or job.keys) for weight in job.weights]
            written[name] = sum(4 * r * sum(w.shape) for r, w in zip(ranks, job.weights, strict=True))
    if "originals" in job.parts:
        paths = original_files(job.source)
        links = job.source.folder is not None and may_link(job.source.folder, job.out)
        written["originals"] = 0 if links else sum(path.stat().st_size for path in paths)
    written["report and model card"] = HEADER_BYTES // 3 + HEADER_BYTES_OF_CONCEPT * len(job.concepts)
    return written, linked, copied


def _replaced_bytes(job: Job) -> tuple[int, int]:
    """Return by how many bytes a quantised model grows, and the bytes of the quantised tensors that it replaces."""
    if job.quantised == PLAIN:
        weights = [weight for block in job.blocks for weight in replaced_weights(job.names, block)]
    else:
        places = [find_quantised(job.names, block) for block in job.blocks]
        weights = [place.weight for place in places if place is not None]
    sizes = {weight.module: (weight.size, math.prod(weight.shape)) for weight in weights}
    size, count = (sum(pair[i] for pair in sizes.values()) for i in range(2))
    growth = count * written_dtype(job).itemsize - size if sizes and job.quantised == PLAIN else 0
    return growth, size if "edit" in job.parts else 0


def _text_bytes(job: Job) -> dict[str, int]:
    """Return the bytes of text that are read: all for the sha256, and once more the part that is used."""
    if job.statistics is not None or not job.texts:
        return {}
    size = sum(text.stat().st_size for text in job.texts)
    return {"text": size + min(size, job.text_tokens() * BYTES_OF_TOKEN)}


def _stages(job: Job) -> dict[str, int]:
    """Return the memory of each stage in bytes, without the model and the second moments."""
    itemsize, n = weight_dtype(job).itemsize, job.keys
    rows = n + job.retained_keys
    weights = [weight.numel() for weight in job.weights]
    d_in = max(weight.shape[1] for weight in job.weights)
    supports = sum(count for count, is_sparse in zip(weights, job.sparse, strict=True) if is_sparse)
    edit = edit_bytes(job, undo=False) + sum(weights) * itemsize + supports  # a support takes a byte for each element
    wide = 3 * 8 * d_in**2 if n > d_in else 4 * 8 * rows**2
    solving = max(2 * 4 * d_in**2 + wide, max(weights) * (4 + itemsize)) + 8 * rows * d_in
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
    """Return the memory in bytes of the states of one layer for a batch.

    The numbers of MLP states (d_in) and of other states (d_out) that are held at once were measured on SmolLM2-135M:
    600 MB for 8,192 tokens in float32.
    """
    d_out, d_in = job.weights[0].shape
    return tokens * (6 * d_in + 16 * d_out) * 4


def _logits(job: Job, tokens: int) -> int:
    """Return the memory in bytes of the logits of some tokens and of their log probabilities."""
    if job.last_layer is not None:
        return 0
    embedding = job.architecture.embedding
    assert isinstance(embedding, nn.Module)
    return 3 * 4 * tokens * int(embedding.weight.shape[0])  # type: ignore[index]
