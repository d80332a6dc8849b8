"""One more token in the vocabulary of a model, by hooks: the embedding and the output matrix stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.evaluation.baselines.layer_outputs import changed_output
from rocr.model.forward import input_embedding


@dataclass(frozen=True)
class ExtraToken:
    """A token that follows the vocabulary.

    Attributes:
        index: Its token id, the number of rows of the embedding.
        row: (d,) float32, its row in the embedding and in the output matrix.
    """

    index: int
    row: nn.Parameter


def output_matrix(model: nn.Module) -> Any:
    """Return the module that computes the logits.

    Raises:
        InputError: There is none whose weight has the shape of the embedding.
    """
    embedding = input_embedding(model)
    find: Any = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.shape != embedding.weight.shape:
        raise InputError(
            f"{type(model).__name__} has no output matrix of the shape of its embedding, "
            f"{tuple(embedding.weight.shape)}, to which a token can be added; leave this method out."
        )
    return head


@contextmanager
def extra_token(model: nn.Module, seed: int) -> Iterator[ExtraToken]:
    """Let a model read and write one more token inside the context.

    Its row starts as the mean of the embedding with a normal deviation of a hundredth of the embedding's, by the seed.

    Raises:
        InputError: The model has no output matrix of the size of its embedding.
    """
    embedding, head = input_embedding(model), output_matrix(model)
    rows = embedding.weight.detach()
    generator = torch.Generator().manual_seed(seed % 2**63)
    noise = torch.randn(rows.shape[1], generator=generator).to(rows.device)
    start = rows.float().mean(dim=0) + 0.01 * rows.float().std() * noise
    token = ExtraToken(len(rows), nn.Parameter(start, requires_grad=False))

    def clamp(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if not active:
            return None
        seen.append(inputs[0] == token.index)
        return (inputs[0].masked_fill(seen[-1], 0), *inputs[1:])

    def read(output: Any, _inputs: tuple[Any, ...]) -> Any:
        places = seen.pop()
        if not bool(places.any()):
            return output
        row = token.row * getattr(embedding, "embed_scale", 1.0)  # Gemma multiplies what it reads
        return torch.where(places.unsqueeze(-1), row.to(output.dtype), output)

    def write(output: Any, inputs: tuple[Any, ...]) -> Any:
        return torch.cat([output, inputs[0] @ token.row.to(inputs[0].dtype).unsqueeze(1)], dim=-1)

    seen: list[Tensor] = []
    active = [True]
    handle = embedding.register_forward_pre_hook(clamp)
    try:
        with changed_output(embedding, read), changed_output(head, write):
            yield token
    finally:
        active.clear()
        handle.remove()
