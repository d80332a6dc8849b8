"""A LoRA adapter (Hu et al., arXiv 2106.09685) made of hooks: it also goes onto a model that has an adapter already."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.evaluation.baselines.layer_outputs import changed_output

TARGETS = ("q_proj", "v_proj")
"""The modules that ORT's authors train (arXiv 2506.07795)."""
SIZES = ("out_features", "in_features")


def adapted_modules(model: nn.Module) -> list[tuple[nn.Module, int, int]]:
    """Return the query and value projections of a model, each with its numbers of outputs and inputs.

    Raises:
        InputError: There are none.
    """
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    sizes: list[list[Any]] = [[getattr(module, name, None) for name in SIZES] for module in modules]
    if not modules or not all(isinstance(size, int) for pair in sizes for size in pair):
        raise InputError(
            f"{type(model).__name__} has no linear modules named {' and '.join(TARGETS)}, which an adapter is trained "
            "on; leave out what trains one."
        )
    return [(module, *size) for module, size in zip(modules, sizes, strict=True)]


@contextmanager
def low_rank_adapter(model: nn.Module, seed: int, rank: int = 8) -> Iterator[list[nn.Parameter]]:
    """Add s B A x to the output of each query and value projection inside the context, and yield all A and B.

    A (rank, d_in) is random, B (d_out, rank) is zero, and s = 2, as in `rocr.evaluation.lora_training`. Both are
    float32. The model's own parameters do not change.

    Args:
        model: Causal language model of transformers.
        seed: Seed of A.
        rank: Rank of the adapter.

    Raises:
        InputError: The model has no such modules.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters: list[nn.Parameter] = []
    with ExitStack() as stack:
        for module, d_out, d_in in adapted_modules(model):
            device = next(module.parameters()).device
            bound = 1 / math.sqrt(d_in)
            start = torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
            down, up = nn.Parameter(start.to(device)), nn.Parameter(torch.zeros(d_out, rank, device=device))
            parameters += [down, up]
            stack.enter_context(changed_output(module, _Addition(down, up)))
        yield parameters


class _Addition:
    """Adds s B A x to the output of a linear module."""

    def __init__(self, down: Tensor, up: Tensor, scale: float = 2.0) -> None:
        self._down, self._up, self._scale = down, up, scale

    def __call__(self, output: Any, inputs: tuple[Any, ...]) -> Any:
        low: Tensor = inputs[0].to(self._down.dtype) @ self._down.T
        return output + (self._scale * (low @ self._up.T)).to(output.dtype)
