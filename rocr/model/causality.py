"""Check that a model reads from left to right: otherwise the keys at a name depend on the text after it."""

from __future__ import annotations

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.model.architecture import Architecture, positions_of
from rocr.model.capture import hidden_hook, run_through

PROBE_TOKENS = 8
CAUSAL_TOLERANCE = 1e-4
"""Relative difference of states; the differences from rounding in float32 are far smaller."""


def check_causal(architecture: Architecture, layer: int) -> None:
    """Raise InputError if the output of a decoder layer depends on later tokens.

    Raises:
        InputError: The model's attention looks ahead.
    """
    if looks_ahead(architecture, layer):
        raise InputError(
            f"The attention of {type(architecture.model).__name__} looks ahead, as in encoders and prefix language "
            "models: the keys at a name depend on the text after it, so an edit would not work in other texts. rocr "
            "edits models that read from left to right."
        )


def looks_ahead(architecture: Architecture, layer: int) -> bool:
    """Return whether the output of a decoder layer depends on later tokens.

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
