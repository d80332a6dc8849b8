"""Estimate the seconds of an edit on the CPU, from the time that one decoder layer and one matrix product take here."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rocr.edit.controls import FURTHER_TOKENS, MAX_CONTROLS, MAX_PLACED, PER_CONCEPT, PROPOSALS
from rocr.edit.harm import ANSWER_TOKENS, MAX_ASKED
from rocr.export.forecast import CHECKED_TOKENS, Forecast, Job
from rocr.model.architecture import Architecture, find_architecture, positions_of
from rocr.model.capture import run_through
from rocr.model.load_partial import decoder_first
from rocr.ops.arithmetic import plain_arithmetic
from rocr.statistics.self_generated import SEQUENCES

PROBE_TOKENS = 512
PROBE_OPERATIONS = 2 * 10**10
"""Largest number of operations of one timed pass through a layer."""
PROBE_ROWS, PROBE_WIDTH = 256, 1024
"""Shape of the timed matrix product: (rows, width) by (width, width)."""
DISK_BYTES_PER_SECOND = 500e6
"""Assumed, since a short measurement of a disk measures its cache."""
PROMPT_TOKENS = 40
"""Assumed length of a question in its chat template."""
NAME_TOKENS, COMPARED_NAMES = 8, 400
"""Assumed length of a name in a short text, and number of listed names that are compared with the concepts."""
GGUF_SECONDS_OF_PARAMETER, GGUF_SECONDS_OF_TOKEN = 33e-9, 31e-6
"""Assumed seconds to load a parameter and a token of the vocabulary of a GGUF file. SmolLM2-135M takes 6.0 s, a tiny
model with 262,144 tokens 8.7 s (benches/results/load_gguf.json)."""
EIGENDECOMPOSITION = 27
"""Operations of an eigendecomposition over those of a Cholesky factorization of the same size."""


@dataclass(frozen=True)
class Speed:
    """Measured speed of this machine.

    Attributes:
        layer: Seconds per token of one decoder layer in a batch.
        step: Seconds of one decoder layer for a single token, as in generation.
        products: Floating-point operations per second of a matrix product in float32.
    """

    layer: float
    step: float
    products: float


@plain_arithmetic()
def measure_speed(architecture: Architecture, dtype: torch.dtype) -> Speed:
    """Time the first decoder layer with made-up weights, and a matrix product; takes about a second.

    Args:
        architecture: A model with parameters on the meta device. It is not changed.
        dtype: Dtype of its weights after loading.
    """
    probe = _with_first_layer(architecture, dtype)
    tokens = max(8, min(PROBE_TOKENS, PROBE_OPERATIONS // (2 * _parameters(probe.layers[0]))))
    length = min(tokens, positions_of(probe.model) or tokens)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, PROBE_WIDTH, generator=generator) for rows in (PROBE_ROWS, PROBE_WIDTH))
    return Speed(
        _seconds(lambda: run_through(probe, 0, torch.zeros(1, length, dtype=torch.int64))) / length,
        _seconds(lambda: run_through(probe, 0, torch.zeros(1, 1, dtype=torch.int64))),
        2 * PROBE_ROWS * PROBE_WIDTH**2 / _seconds(lambda: left @ right),
    )


def _with_first_layer(architecture: Architecture, dtype: torch.dtype) -> Architecture:
    """Return a copy of a model in which the embedding and the first layer have constant weights and can be run."""
    probe = find_architecture(copy.deepcopy(architecture.model))
    layers, first = f"{probe.layers_name}.", f"{probe.layers_name}.0."
    decoder = probe.layers_name.rpartition(".")[0]
    # The embeddings of BERT and CLIP are beside the module that holds the layers.
    read = (f"{decoder}.", f"{_around_embedding(probe)}.") if decoder else ("",)
    # T5 has its embedding under two names.
    for name, parameter in list(probe.model.named_parameters(remove_duplicate=False)):
        if not name.startswith(read) or (name.startswith(layers) and not name.startswith(first)):
            continue
        owner, _, leaf = name.rpartition(".")
        # Zeros take no memory before they are written. The layer's weights are written, so that they are really read.
        values = torch.zeros(parameter.shape, dtype=dtype)
        if name.startswith(first):
            values.fill_(0.01)
        probe.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    decoder_first(probe)
    return probe


def _around_embedding(architecture: Architecture) -> str:
    """Return the name of the module around the input embedding; of the embedding itself if that is the whole model."""
    names = (name for name, module in architecture.model.named_modules() if module is architecture.embedding)
    name = next(names, "")
    return name.rpartition(".")[0] or name


def estimate_stages(job: Job, speed: Speed, sizes: Forecast) -> dict[str, float]:
    """Return the estimated seconds of each stage of a command on the CPU, without the time to import libraries.

    Args:
        job: The edit.
        speed: Speed of this machine.
        sizes: What the edit reads and writes.
    """
    # What is written is read once more for its sha256; originals are read and written.
    saved = 2 * (sum(sizes.written.values()) + sizes.read.get("sha256 of the originals", 0))
    statistics = (sizes.read.get("text", 0) + sizes.read.get("statistics", 0)) / DISK_BYTES_PER_SECOND
    asked = job.questions and job.last_layer is None
    return {
        "load": sizes.read.get("model", 0) / DISK_BYTES_PER_SECOND + _decoding(job),
        "statistics": statistics + (_statistics(job, speed) if job.statistics is None else 0.0),
        "edit": _edit(job, speed) + _controls(job, speed),
        "answers": 2 * _generation(job, speed, job.questions, PROMPT_TOKENS, job.answer_tokens) if asked else 0.0,
        "save": saved / DISK_BYTES_PER_SECOND,
    }


def _decoding(job: Job) -> float:
    """Return the seconds that a GGUF file takes beyond its reading: its tokenizer is rebuilt, its weights decoded."""
    if job.source.gguf is None:
        return 0.0
    parameters = sum(parameter.numel() for parameter in job.architecture.model.parameters())
    embedding = job.architecture.embedding.weight
    assert isinstance(embedding, torch.Tensor)
    return GGUF_SECONDS_OF_PARAMETER * parameters + GGUF_SECONDS_OF_TOKEN * embedding.shape[0]


def _statistics(job: Job, speed: Speed) -> float:
    tokens = job.text_tokens()
    seconds = tokens * (max(job.layers) + 1) * speed.layer
    # A second moment is symmetric: half of its products are computed.
    seconds += sum(tokens * weight.shape[1] ** 2 for weight in job.weights) / speed.products
    if not job.texts:
        rows = min(SEQUENCES, tokens)
        seconds += _generation(job, speed, rows, 1, -(-tokens // rows))
    return seconds


def _edit(job: Job, speed: Speed) -> float:
    keys, targets = (sum(len(p.tokens) for p in reading.prompts) for reading in (job.plan.keys, job.plan.targets))
    seconds = ((len(job.layers) + 1) * keys + targets) * (max(job.layers) + 1) * speed.layer
    if job.last_layer is None:
        seconds += 2 * CHECKED_TOKENS * _all_layers(job) * speed.layer
    n = job.keys
    for weight in job.weights:
        d_out, d_in = weight.shape
        metric = d_in**3 / 3 * (1 if job.config.method == "whitened" else EIGENDECOMPOSITION)
        system = 2 * n * d_in**2 + 2 * n * min(n, d_in) * d_in + min(n, d_in) ** 3 / 3 + 2 * n * d_out * d_in
        seconds += (metric + 2 * system) / speed.products  # the system is in float64, at half the speed
    return seconds


def _controls(job: Job, speed: Speed) -> float:
    """Return the seconds in which names that the edit may harm are proposed, read, retained and asked about."""
    if not job.retained_keys:
        return 0.0
    count = len(job.concepts)
    retained = min(PER_CONCEPT * count, MAX_CONTROLS) * len(job.config.templates) * NAME_TOKENS
    seconds = (COMPARED_NAMES * NAME_TOKENS * (min(job.layers) + 1) + retained * (max(job.layers) + 1)) * speed.layer
    if job.last_layer is not None:
        return seconds
    placed = min(count, MAX_PLACED)
    names = sum(len(concept.names) for concept in job.concepts) / count
    proposed = PROPOSALS * placed
    # A proposal is scored after a question with each name of its concept, with and without a space before it.
    scored = proposed * 2 * names * (PROMPT_TOKENS + NAME_TOKENS)
    seconds += _generation(job, speed, proposed, NAME_TOKENS, FURTHER_TOKENS)
    if job.questions:
        seconds += _generation(job, speed, MAX_ASKED, PROMPT_TOKENS, ANSWER_TOKENS)
        scored += 2 * MAX_ASKED * (PROMPT_TOKENS + ANSWER_TOKENS)
    return seconds + scored * _all_layers(job) * speed.layer


def _generation(job: Job, speed: Speed, rows: int, prompt: int, steps: int) -> float:
    """Return the seconds of a prompt in each row and of `steps` further tokens, each for all rows at once."""
    return (rows * prompt * speed.layer + steps * max(speed.step, rows * speed.layer)) * _all_layers(job)


def _all_layers(job: Job) -> float:
    """Return the number of decoder layers, with the output matrix as the share of a layer that its parameters are."""
    output = job.architecture.embedding.weight
    assert isinstance(output, torch.Tensor)
    return job.architecture.depth + output.numel() / _parameters(job.architecture.layers[0])


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _seconds(run: Callable[[], object]) -> float:
    """Return the duration of the faster of two runs, after one that is not timed."""
    run()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
