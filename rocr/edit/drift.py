"""The safety limit of text encoders, which have no predictions: how far an edit moves their states on ordinary text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rocr.concepts import Concept
from rocr.edit.guards import PROBE_TEXT, Guards, largest_concepts, stop
from rocr.edit.update import LayerUpdate
from rocr.errors import GuardError
from rocr.model.architecture import Architecture, positions_of
from rocr.model.capture import hidden_hook, run_through
from rocr.model.tokenizer import closing_tokens, tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic


@dataclass(frozen=True)
class FinalStates:
    """The states of a text encoder on the probe text.

    Attributes:
        tokens: (1, t) int64 token ids of the text, with the tokenizer's opening and closing tokens.
        states: (t, d_out) float32 on the CPU, the output of the last layer.
    """

    tokens: Tensor
    states: Tensor


def read_final_states(architecture: Architecture, tokenizer: Any) -> FinalStates | None:
    """Return a text encoder's states on the probe text; None for a language model or one that is not all loaded.

    Raises:
        GuardError: The states are not finite.
    """
    if architecture.kind.writes_text or architecture.is_partial:
        return None
    closing = closing_tokens(tokenizer)
    ids = tokenize_prompt(tokenizer, PROBE_TEXT)
    room = (positions_of(architecture.model) or len(ids) + len(closing)) - len(closing)
    tokens = torch.tensor([[*ids[: max(1, room)], *closing]])
    states = _states(architecture, tokens)
    if not torch.isfinite(states).all():
        raise GuardError("The model's states on ordinary text are not finite before the edit. Load it in float32.")
    return FinalStates(tokens, states)


def check_drift(
    guards: Guards,
    before: FinalStates | None,
    architecture: Architecture,
    updates: Sequence[LayerUpdate],
    concept_of: Sequence[int],
    concepts: Sequence[Concept],
) -> tuple[float | None, list[str]]:
    """Check a text encoder's states after an edit against those before it.

    Returns:
        The mean over the tokens of |h' - h| / |h|, or None without states, and a sentence if it exceeds its limit and
        `guards.force`.

    Raises:
        GuardError: The states are not finite, or move by more than the limit. The message names the concepts.
    """
    if before is None:
        return None, []
    after = _states(architecture, before.tokens)
    if not torch.isfinite(after).all():
        raise GuardError(
            "The states on ordinary text are not finite after the edit; most of it is from "
            f"{largest_concepts(updates, concept_of, concepts)}. The weights were restored."
        )
    apart = (after - before.states).norm(dim=-1)
    drift = float((apart / before.states.norm(dim=-1).clamp(min=1e-30)).mean())
    if drift <= guards.drift:
        return drift, []
    sentence = (
        f"The edit moves the states of ordinary text by {drift:.2g} of their length, above the limit of "
        f"{guards.drift:g}; most of it is from {largest_concepts(updates, concept_of, concepts)}."
    )
    return drift, stop(guards, [sentence])


@plain_arithmetic()
def _states(architecture: Architecture, tokens: Tensor) -> Tensor:
    """Return the output of the last layer, (t, d_out) float32 on the CPU."""
    last = architecture.depth - 1
    found: list[Tensor] = []
    with hidden_hook(architecture, last, found.append):
        run_through(architecture, last, tokens)
    return found[0].reshape(tokens.shape[1], -1).float().cpu()
