"""Whether a model reads from left to right, which keys that are read at a name rely on."""

from __future__ import annotations

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.model.architecture import Architecture, positions_of
from rocr.model.capture import hidden_hook, run_through

PROBE_TOKENS = 8
CAUSAL_TOLERANCE = 1e-4
"""Relative difference of states that rounding in float32 stays far below."""


def check_causal(architecture: Architecture, layer: int) -> None:
    """Refuse a model whose states, up to the output of a decoder layer, depend on later tokens.

    Raises:
        InputError: its attention looks ahead.
    """
    if looks_ahead(architecture, layer):
        raise InputError(
            f"The attention of {type(architecture.model).__name__} looks ahead, as in encoders and prefix language "
            "models: what it reads at a name depends on what follows, so that an edit made in some texts does not hold "
            "in others. rocr edits models that read from left to right."
        )


def looks_ahead(architecture: Architecture, layer: int) -> bool:
    """Whether the output of a decoder layer depends on later tokens.

    Two texts of one beginning are run. Where attention is causal, states of the beginning are the same but for the
    rounding of sums whose order may depend on other rows, as in a mixture of experts.
    """
    count = min(PROBE_TOKENS, positions_of(architecture.model) or PROBE_TOKENS)
    begun, vocabulary = count // 2, len(architecture.embedding.weight)  # type: ignore[arg-type]
    # Not from the first tokens, nor the last: special ones may mean images or padding to a model.
    first, second = (torch.arange(count) + vocabulary // part for part in (2, 4))
    tokens = torch.stack([first, torch.cat([first[:begun], second[begun:]])]) % vocabulary
    found: list[Tensor] = []
    with hidden_hook(architecture, layer, found.append):
        run_through(architecture, layer, tokens)
    if found[0].shape[:2] != tokens.shape:
        return False  # a layout that reading refuses
    one, other = found[0][:, :begun].double()
    apart = (one - other).norm(dim=-1) / one.norm(dim=-1)
    return bool((apart > max(CAUSAL_TOLERANCE, 2 * torch.finfo(found[0].dtype).eps)).any())
