"""Find out by running a model whether it reads from left to right or both ways, and whether it writes text."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.model.architecture import Architecture, positions_of
from rocr.model.capture import hidden_hook, run_through
from rocr.model.forward import forward
from rocr.model.hooks import evaluating
from rocr.model.kind import ModelKind

PROBE_TOKENS = 8
CAUSAL_TOLERANCE = 1e-4
"""Relative difference of states; the differences from rounding in float32 are far smaller."""


def with_kind(architecture: Architecture, layer: int) -> Architecture:
    """Return an architecture with the kind of its model, found by running it.

    Args:
        architecture: The architecture.
        layer: The last layer whose states are read.

    Raises:
        InputError: The model cannot be run.
    """
    bidirectional = looks_ahead(architecture, layer)
    return replace(architecture, kind=ModelKind(bidirectional, not bidirectional and _has_logits(architecture)))


def check_writes(architecture: Architecture, what: str) -> None:
    """Raise InputError if the model is a text encoder.

    Args:
        architecture: The architecture, from `with_kind`.
        what: What the model cannot do, as the object of a sentence.
    """
    if not architecture.kind.writes_text:
        raise InputError(f"{type(architecture.model).__name__} is edited as a text encoder, which cannot {what}")


def looks_ahead(architecture: Architecture, layer: int) -> bool:
    """Return whether the output of a layer depends on later tokens.

    Two texts with the same beginning are run. If attention is causal, the states of the beginning differ by rounding
    at most: the order of sums may depend on other rows, as in a mixture of experts.
    """
    count = min(PROBE_TOKENS, positions_of(architecture.model) or PROBE_TOKENS)
    begun, vocabulary = count // 2, len(architecture.embedding.weight)  # type: ignore[arg-type]
    # Avoid the first and last token ids, which may be special tokens for images or padding.
    first, second = (torch.arange(count) + vocabulary // part for part in (2, 4))
    tokens = torch.stack([first, torch.cat([first[:begun], second[begun:]])]) % vocabulary
    found: list[Tensor] = []
    with hidden_hook(architecture, layer, found.append):
        run_through(architecture, layer, tokens)
    states = found[0]
    if states.ndim == 4 and states.shape[1:3] == tokens.shape:
        states = states.movedim(0, 2)
    if states.shape[:2] != tokens.shape:
        return False  # `as_states` refuses this shape later
    one, other = states[:, :begun].double()
    apart = (one - other).norm(dim=-1) / one.norm(dim=-1)
    return bool((apart > max(CAUSAL_TOLERANCE, 2 * torch.finfo(states.dtype).eps)).any())


def _has_logits(architecture: Architecture) -> bool:
    """Return whether a model that reads from left to right returns logits instead of the states of its last layer."""
    model = architecture.model
    if architecture.encodes_for_decoder:
        return False
    head = getattr(model, "get_output_embeddings", None)
    if head is None or head() is not None or any(each.device.type == "meta" for each in model.parameters()):
        return True
    # Code that comes with a model may not name its head.
    with evaluating(model):
        output = forward(model, torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return hasattr(output, "logits") or isinstance(output, (Tensor, tuple))
