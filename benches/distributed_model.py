"""Model what `rocr stats` sends over the network under torchrun, and how long it takes, from counts of its own code.

    python benches/distributed_model.py [--width 14336] [--layers 3] [--tokens 100000000]

Nothing is sent: the sums run on tensors without memory, and count what they would send. Times are the counts over line
rates, so that they are bounds and no measurements. It prints one Markdown table.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rocr.statistics.collect import CollectOptions
from rocr.statistics.distributed import Distributed
from rocr.statistics.sums import LayerSums

RESULTS = Path(__file__).parent / "results" / "nvidia-h200.json"
"""Where the seconds of a token on one H200 come from: the row "statistics", in the shape of Llama 3 8B."""

NVLINK = 450e9
"""Bytes a second that an H200 sends over NVLink: 900 GB/s both ways together (NVIDIA H200 data sheet)."""

NETWORK = 50e9
"""Bytes a second of a GPU's network port: eight of 400 Gb/s for eight GPUs (NVIDIA DGX H200 data sheet)."""

LATENCY = {"NVLink": 20e-6, "network": 100e-6}
"""Assumed seconds of a sum of a few bytes, with all that surrounds it."""

CLUSTERS = ((1, 8), (2, 8), (8, 8), (64, 8))
"""Nodes, and GPUs of a node."""


@dataclass
class Counted(Distributed):
    """A group of processes that counts what its sums send instead of sending it.

    Attributes:
        sent: Bytes of each sum over the processes.
    """

    sent: list[int] = field(default_factory=list)

    def _sum(self, values: Tensor) -> Tensor:
        wide = torch.float64 if values.is_floating_point() else torch.int64
        self.sent.append(values.numel() * wide.itemsize)
        return values.to(wide)


def bytes_of_layer(width: int) -> list[int]:
    """Return the bytes of each sum of one dense layer with keys of this width."""
    group = Counted(size=2)
    group.sum_layer(LayerSums((torch.empty(width, width, device="meta"),)))
    return group.sent


def bytes_of_round() -> list[int]:
    """Return the bytes of each sum of the barrier after a round."""
    group = Counted(size=2)
    group.barrier()
    return group.sent


def seconds_of_sum(size: int, nodes: int, gpus: int) -> float:
    """Return the seconds of a sum of `size` bytes over all GPUs, at line rate.

    Each GPU sends 2 (n - 1) / n times the size (nccl-tests, doc/PERFORMANCE.md): over NVLink in one node. With more
    nodes, the GPUs of a node first add their shares over NVLink, and each one sums its share over the nodes.
    """
    inside = 2 * (gpus - 1) / gpus * size / NVLINK
    between = 2 * (nodes - 1) / nodes * (size / gpus) / NETWORK
    return inside + between + LATENCY["network" if nodes > 1 else "NVLink"]


def seconds_of_token() -> float:
    """Return the measured seconds of a token on one H200."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    (row,) = [each for each in rows if each["work"] == "statistics" and each["baseline"] == "official"]
    microseconds: float = row["rate"]["rocr microseconds a token"]
    return microseconds * 1e-6


def table(width: int, layers: int, tokens: int) -> str:
    """Return the model as a Markdown table."""
    batch = CollectOptions().batch_tokens
    lines = [
        "| nodes × GPUs | forward, s | rounds | barriers, s | sums, GB | sums, s | share of work | tokens a second |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for nodes, gpus in CLUSTERS:
        processes = nodes * gpus
        rounds = -(-tokens // (batch * processes))
        forward = rounds * batch * seconds_of_token()
        barriers = (rounds + 1) * sum(seconds_of_sum(size, nodes, gpus) for size in bytes_of_round())
        sent = bytes_of_layer(width) * layers
        sums = sum(seconds_of_sum(size, nodes, gpus) for size in sent)
        total = forward + barriers + sums
        lines.append(
            f"| {nodes} × {gpus} | {forward:.2f} | {rounds:,} | {barriers:.4f} | {sum(sent) / 1e9:.2f} | {sums:.3f} | "
            f"{forward / total:.1%} | {tokens / total / 1e6:.1f} million |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=14336, help="width of the keys (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="number of layers (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the text (default: %(default)s)")
    arguments = parser.parse_args()
    print(table(arguments.width, arguments.layers, arguments.tokens))


if __name__ == "__main__":
    main()
