"""Find out by running a model whether it reads from left to right or both ways, and whether it writes text."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rocr.errors import InputError
from rocr.model.architecture import Architecture, positions_of
from rocr.model.capture import hidden_hook, run_through
from rocr.model.encoder import is_encoder_decoder
from rocr.model.forward import forward, input_embedding, logits_of
from rocr.model.hooks import evaluating
from rocr.model.kind import ModelKind
from rocr.model.wrappers import unwrapped

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


def kind_by_class(model: nn.Module) -> ModelKind:
    """Return the kind that a model has by its class, for one that has no weights to run.

    Of a text encoder it is not known whether it reads both ways.
    """
    base = unwrapped(model)
    can_generate = getattr(base, "can_generate", None)
    return ModelKind(writes_text=not is_encoder_decoder(base) and (can_generate is None or bool(can_generate())))


def check_writes(architecture: Architecture, what: str) -> None:
    """Raise InputError if the model is a text encoder.

    Args:
        architecture: The architecture, from `with_kind`.
        what: What the model cannot do, as the object of a sentence.
    """
    if not architecture.kind.writes_text:
        raise InputError(f"{type(architecture.model).__name__} is edited as a text encoder, which cannot {what}")


def check_writes_text(model: nn.Module, what: str) -> None:
    """Raise InputError unless a model continues the text that it reads.

    Args:
        model: A model of transformers.
        what: What needs that, as the subject of a sentence.
    """
    reason = why_no_text(model)
    if reason is not None:
        raise InputError(
            f"{what} needs a language model that continues the text that it reads, and {reason}. Compare its "
            "embeddings before and after an edit instead."
        )


def why_no_text(model: nn.Module) -> str | None:
    """Return why a model does not continue the text that it reads, as a clause; None if it does."""
    base = unwrapped(model)
    name = type(base).__name__
    if is_encoder_decoder(base):
        return f"{name} reads it with an encoder"
    can_generate = getattr(base, "can_generate", None)
    if can_generate is not None and can_generate():
        return None
    tokens, begun = _two_texts(base, len(input_embedding(base).weight))
    with evaluating(base):
        output = forward(base, tokens, use_cache=False)
        try:
            logits = logits_of(output)
        except InputError:
            return f"{name} is a text encoder, which returns states and no predictions"
    if _differ(logits[0, :begun], logits[1, :begun]):
        return f"{name} is a text encoder, whose predictions depend on the text after them"
    return None


def looks_ahead(architecture: Architecture, layer: int) -> bool:
    """Return whether the output of a layer depends on later tokens.

    Two texts with the same beginning are run. If attention is causal, the states of the beginning differ by rounding
    at most: the order of sums may depend on other rows, as in a mixture of experts.
    """
    tokens, begun = _two_texts(architecture.model, len(architecture.embedding.weight))  # type: ignore[arg-type]
    found: list[Tensor] = []
    with hidden_hook(architecture, layer, found.append):
        run_through(architecture, layer, tokens)
    states = found[0]
    if states.ndim == 4 and states.shape[1:3] == tokens.shape:
        states = states.movedim(0, 2)
    if states.shape[:2] != tokens.shape:
        return False  # `as_states` refuses this shape later
    return _differ(states[0, :begun], states[1, :begun])


def _two_texts(model: nn.Module, vocabulary: int) -> tuple[Tensor, int]:
    """Return two texts of token ids with the same beginning, (2, tokens), and the number of tokens in it."""
    count = min(PROBE_TOKENS, positions_of(model) or PROBE_TOKENS)
    begun = count // 2
    # Avoid the first and last token ids, which may be special tokens for images or padding.
    first, second = (torch.arange(count) + vocabulary // part for part in (2, 4))
    return torch.stack([first, torch.cat([first[:begun], second[begun:]])]) % vocabulary, begun


def _differ(one: Tensor, other: Tensor) -> bool:
    """Return whether rows differ by more than rounding."""
    apart = (one.double() - other.double()).norm(dim=-1) / one.double().norm(dim=-1)
    return bool((apart > max(CAUSAL_TOLERANCE, 2 * torch.finfo(one.dtype).eps)).any())


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
