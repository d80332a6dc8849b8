"""How long an edit may take: arithmetic counted from shapes, divided by what this machine does in a short probe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rocr.forecast import PROBE_TOKENS, SAMPLED_TOKENS, Forecast, Job, held_bytes
from rocr.sampling import SEQUENCES

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
        products: operations a second of a matrix product in the model's dtype.
        exact_products: the same in float32.
        memory: bytes a second of reading and writing memory.
    """

    products: float
    exact_products: float
    memory: float


def measure_speed(dtype: torch.dtype, width: int) -> Speed:
    """Time a product of 256 rows in the model's dtype and in float32, and a copy of memory; some tenths of a second."""
    size = min(width, PROBE_WIDTH)
    operations = 2 * PROBE_ROWS * size * size
    block = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    other = torch.empty_like(block)
    return Speed(
        operations / _seconds(_product(dtype, size)),
        operations / _seconds(_product(torch.float32, size)),
        2 * PROBE_BYTES / _seconds(lambda: other.copy_(block)),
    )


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
    seconds = tokens * 2 * _first_layers(job) / speed.products
    # One triangle of each second moment: half the products.
    seconds += sum(tokens * weight.shape[1] ** 2 for weight in job.weights) / speed.exact_products
    if not job.texts:
        wanted = job.tokens or SAMPLED_TOKENS
        rows = min(SEQUENCES, wanted)
        seconds += _generation(job, speed, rows, 1, -(-wanted // rows))
    return seconds


def _edit(job: Job, speed: Speed) -> float:
    per_token = 2 * _first_layers(job)
    keys, targets = (sum(len(p.tokens) for p in reading.prompts) for reading in (job.plan.keys, job.plan.targets))
    seconds = ((len(job.layers) + 1) * keys + targets) * per_token / speed.products
    if job.last_layer is None:
        seconds += 2 * PROBE_TOKENS * 2 * _parameters(job) / speed.products
    n = job.keys
    for weight in job.weights:
        d_out, d_in = weight.shape
        metric = d_in**3 / 3 * (1 if job.config.method == "whitened" else EIGENDECOMPOSITION)
        system = 2 * n * d_in**2 + 2 * n * min(n, d_in) * d_in + min(n, d_in) ** 3 / 3 + 2 * n * d_out * d_in
        # In float64 a product takes twice as long.
        seconds += (metric + 2 * system) / speed.exact_products + 16 * weight.numel() / speed.memory
    return seconds


def _generation(job: Job, speed: Speed, rows: int, first: int, steps: int) -> float:
    """Each step reads all weights, and each token takes its products."""
    reading = steps * held_bytes(job) / speed.memory
    return reading + rows * (first + steps) * 2 * _parameters(job) / speed.products


def _first_layers(job: Job) -> int:
    """Parameters that a token meets up to the last edited layer."""
    layers = job.architecture.layers[: max(job.layers) + 1]
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def _parameters(job: Job) -> int:
    """Parameters that a token meets in the whole model: the embedding is a table, but the output is a product."""
    return sum(parameter.numel() for parameter in job.architecture.model.parameters())


def _product(dtype: torch.dtype, size: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, size, generator=generator).to(dtype) for rows in (PROBE_ROWS, size))
    return lambda: left @ right


def _seconds(run: Callable[[], object]) -> float:
    """Of the faster of two runs after one that is not timed."""
    run()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
