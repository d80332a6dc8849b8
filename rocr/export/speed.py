"""How long an edit may take: work counted from shapes, timed on this machine in a short probe."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rocr.export.forecast import CHECKED_TOKENS, SAMPLED_TOKENS, Forecast, Job
from rocr.model.architecture import Architecture, positions_of
from rocr.model.capture import run_through
from rocr.ops.arithmetic import plain_arithmetic
from rocr.statistics.self_generated import SEQUENCES

PROBE_TOKENS = 512
PROBE_OPERATIONS = 2 * 10**10
PROBE_ROWS = 256
PROBE_WIDTH = 2048
PROBE_BYTES = 32 * 2**20
DISK_BYTES_PER_SECOND = 500e6
"""Assumed, not measured: a probe of a disk measures its cache."""
CHAT_TOKENS = 40
EIGENDECOMPOSITION = 27
"""Its arithmetic over that of a Cholesky factorisation."""


@dataclass(frozen=True)
class Speed:
    """What this machine does.

    Attributes:
        layer: seconds a token of one decoder layer, in a batch.
        step: seconds of one decoder layer on a single token, as in writing.
        products: operations a second of a float32 matrix product.
        memory: bytes a second of reading and writing memory.
    """

    layer: float
    step: float
    products: float
    memory: float


@plain_arithmetic()
def measure_speed(architecture: Architecture, dtype: torch.dtype) -> Speed:
    """Time the first decoder layer with made-up weights, a float32 product, and a copy of memory; about a second.

    Args:
        architecture: of a model whose parameters are on the meta device; it is not changed.
        dtype: of its weights once they are loaded.
    """
    probe = _with_first_layer(architecture, dtype)
    parameters = sum(parameter.numel() for parameter in probe.layers[0].parameters())
    tokens = max(8, min(PROBE_TOKENS, PROBE_OPERATIONS // (2 * parameters)))
    positions = positions_of(probe.model) or tokens
    length = min(tokens, positions)
    size = min(probe.down_projection(0).weight.shape[1], PROBE_WIDTH)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, size, generator=generator) for rows in (PROBE_ROWS, size))
    block = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    other = torch.empty_like(block)
    return Speed(
        _seconds(lambda: run_through(probe, 0, torch.zeros(1, length, dtype=torch.int64))) / length,
        _seconds(lambda: run_through(probe, 0, torch.zeros(1, 1, dtype=torch.int64))),
        2 * PROBE_ROWS * size * size / _seconds(lambda: left @ right),
        2 * PROBE_BYTES / _seconds(lambda: other.copy_(block)),
    )


def _with_first_layer(architecture: Architecture, dtype: torch.dtype) -> Architecture:
    """A copy of a model whose embedding and first layer can be run, with weights that say nothing."""
    probe = copy.deepcopy(architecture)
    layers, first = f"{probe.layers_name}.", f"{probe.layers_name}.0."
    decoder = probe.layers_name.rpartition(".")[0]
    for name, parameter in list(probe.model.named_parameters()):
        if not name.startswith(decoder) or (name.startswith(layers) and not name.startswith(first)):
            continue
        owner, _, leaf = name.rpartition(".")
        # Zeros take no memory until they are written; a layer's weights are written, to be read as real ones are.
        values = torch.zeros(parameter.shape, dtype=dtype)
        if name.startswith(first):
            values.fill_(0.01)
        probe.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    return probe


def estimate_seconds(job: Job, speed: Speed, sizes: Forecast) -> dict[str, float]:
    """Seconds of each stage of the command, on the CPU.

    Args:
        job: the edit.
        speed: of this machine.
        sizes: what the edit reads and writes.
    """
    saved = sum(sizes.written.values())
    read = sum(size for part, size in sizes.read.items() if part in ("model", "text", "statistics"))
    found = {"load": read / DISK_BYTES_PER_SECOND}
    if job.questions and job.last_layer is None:
        found["answers"] = 2 * _generation(job, speed, job.questions, CHAT_TOKENS, job.answer_tokens)
    if job.statistics is None:
        found["statistics"] = _statistics(job, speed)
    found["edit"] = _edit(job, speed)
    found["save"] = (saved + sizes.read.get("sha256 of the originals", 0)) * 2 / DISK_BYTES_PER_SECOND
    return found


def _statistics(job: Job, speed: Speed) -> float:
    tokens = job.text_tokens()
    seconds = tokens * (max(job.layers) + 1) * speed.layer
    # One triangle of each second moment: half the products.
    seconds += sum(tokens * weight.shape[1] ** 2 for weight in job.weights) / speed.products
    if not job.texts:
        wanted = job.tokens or SAMPLED_TOKENS
        rows = min(SEQUENCES, wanted)
        seconds += _generation(job, speed, rows, 1, -(-wanted // rows))
    return seconds


def _edit(job: Job, speed: Speed) -> float:
    keys, targets = (sum(len(p.tokens) for p in reading.prompts) for reading in (job.plan.keys, job.plan.targets))
    seconds = ((len(job.layers) + 1) * keys + targets) * (max(job.layers) + 1) * speed.layer
    if job.last_layer is None:
        seconds += 2 * CHECKED_TOKENS * _whole(job, speed)
    n = job.keys
    for weight in job.weights:
        d_out, d_in = weight.shape
        metric = d_in**3 / 3 * (1 if job.config.method == "whitened" else EIGENDECOMPOSITION)
        system = 2 * n * d_in**2 + 2 * n * min(n, d_in) * d_in + min(n, d_in) ** 3 / 3 + 2 * n * d_out * d_in
        # In float64 a product takes twice as long.
        seconds += (metric + 2 * system) / speed.products + 16 * weight.numel() / speed.memory
    return seconds


def _generation(job: Job, speed: Speed, rows: int, first: int, steps: int) -> float:
    """The prompts of all rows at once, then a token of each row a step: at least as long as one of a single row."""
    step = max(job.architecture.depth * speed.step + 2 * _output(job) / speed.memory, rows * _whole(job, speed))
    return rows * first * _whole(job, speed) + steps * step


def _whole(job: Job, speed: Speed) -> float:
    """Seconds a token of all layers and of the product that gives the logits."""
    return job.architecture.depth * speed.layer + 2 * _output(job) / speed.products


def _output(job: Job) -> int:
    """Entries of the output matrix."""
    weight = job.architecture.embedding.weight
    assert isinstance(weight, torch.Tensor)
    return weight.numel()


def _seconds(run: Callable[[], object]) -> float:
    """Of the faster of two runs after one that is not timed."""
    run()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
