"""Safety limits: roll back an edit that exceeds one, and report which concepts caused it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from rocr.concepts import MAX_CONCEPTS, Concept
from rocr.config import EditConfig
from rocr.edit.collisions import nearest_keys
from rocr.edit.harm import Harm
from rocr.edit.measures import LayerMeasures
from rocr.edit.update import LayerUpdate
from rocr.errors import GuardError, InputError
from rocr.model.architecture import Architecture, positions_of
from rocr.model.forward import forward, logits_of
from rocr.model.hooks import evaluating
from rocr.model.tokenizer import tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic

SHOWN_CONCEPTS = 3
"""Largest number of concepts that an error names."""
PROBE_TEXT = (
    "The river rises in the hills and flows past three small towns before it reaches the sea. In spring, when the "
    "snow melts, the water is high and cold, and the mills along its banks turn day and night. Most families there "
    "keep a garden; they grow beans, onions and a few apple trees. On market day the square is full of people who "
    "sell bread, cloth and tools, and who talk about the weather, the harvest and the price of wool."
)
"""Ordinary prose without names. No edit should change the predictions of a model on it by much."""


@dataclass(frozen=True)
class Guards:
    """Safety limits of an edit. `rocr.unlearn` raises GuardError and restores the model if an edit exceeds one.

    The typical values below are of edits of 1 to 5 people in SmolLM2-135M.

    Attributes:
        relative_norm: Maximum of the Frobenius norm of a layer's update over that of its weight. Typical: 0.03 to 0.5.
            An update of twice the norm of the weight leaves little of what the layer computes.
        surviving: Minimum share of the entries of a weight that the update changes after rounding. Typical: above 0.9
            in float32. Below 0.01, the saved model hardly contains the solution.
        condition: Maximum condition number of the solved system. Typical: below 100. From 1e7 on, the rounding of
            float32 keys determines the result.
        closed: Minimum share of a concept's residuals that the updates close, as a mean over the layers. Typical:
            above 0.4. Below zero, the concept moves away from its redirect.
        distance: Maximum share that is missing of the movement of the states that the updates should cause, as a mean
            over the concepts. Typical: below 0.5. Near 1, something between the edited weights and the states
            cancels the updates. Not checked with `contexts="official"`, where the states are not read at the keys.
        divergence: Maximum mean Kullback-Leibler divergence of the model's predictions on ordinary prose after the
            edit from those before it, in nats per token. Typical: below 0.05. At 1, about every second word changes.
            A text encoder predicts nothing; `drift` takes its place.
        drift: Maximum mean distance of a text encoder's last states on ordinary prose after the edit from those before
            it, as a share of their length. Typical: below 0.05 (tests/unit/test_encoders.py). At 0.5, half of what the
            encoder says about any text changes.
        kept_answers: Minimum share of the probability per token that the edit leaves to the model's own answer about
            each name that is not unlearned, of those that it moves most (`rocr.edit.harm`). Typical: 0.07 to 0.9. At
            0.03, hardly a word of the answer is left.
        concepts: Maximum number of concepts of one edit, including those of a base edit. `force` does not lift it. It
            bounds time and memory, which are measured up to the default.
        force: Whether an edit may exceed the other limits. The report then lists the exceeded ones. Values that are
            not finite raise GuardError in any case.

    Raises:
        InputError: A limit is not a number.
    """

    relative_norm: float = 2.0
    surviving: float = 0.01
    condition: float = 1e7
    closed: float = 0.0
    distance: float = 0.7
    divergence: float = 1.0
    concepts: int = MAX_CONCEPTS
    force: bool = False
    drift: float = 0.5
    kept_answers: float = 0.03

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or math.isnan(value):
                raise InputError(f"The limit {field.name} must be a number, not {value!r}.")


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model on the probe text.

    Attributes:
        tokens: (1, t) int64 token ids of the text.
        log_probabilities: (t, vocabulary) float32 on the CPU.
    """

    tokens: Tensor
    log_probabilities: Tensor


def check_layer(
    guards: Guards, measures: LayerMeasures, update: LayerUpdate, concept_of: Sequence[int], concepts: Sequence[Concept]
) -> list[str]:
    """Check the measures of a layer against the limits.

    Returns:
        One sentence for each limit that is exceeded. Not empty only with `guards.force`.

    Raises:
        GuardError: A limit is exceeded. The message names the concepts that cause it.
    """
    exceeded = []
    where = f"at layer {measures.layer}"
    if not measures.relative_norm <= guards.relative_norm:
        exceeded.append(
            f"The update {where} has {measures.relative_norm:.2g} times the norm of the weight, above the limit of "
            f"{guards.relative_norm:g}; most of it is from {largest_concepts([update], concept_of, concepts)}."
        )
    if not measures.surviving >= guards.surviving:
        exceeded.append(
            f"Rounding to {update.applied.dtype if update.applied else 'the dtype'} leaves {measures.surviving:.2%} of "
            f"the weight changed {where}, below the limit of {guards.surviving:.2%}, for {_all(concepts)}; load the "
            "model in float32."
        )
    if not measures.condition <= guards.condition:
        exceeded.append(
            f"The system {where} has a condition number of {measures.condition:.2g}, above the limit of "
            f"{guards.condition:.2g}: the keys of {_closest(update.keys, concept_of, concepts)} are nearly equal; "
            "raise the ridge."
        )
    return stop(guards, exceeded)


def check_closed(guards: Guards, layers: Sequence[LayerMeasures], concepts: Sequence[Concept]) -> list[str]:
    """Check the closed share of each concept's residuals, mean over the layers; returns and raises as `check_layer`."""
    shares = [sum(layer.closed[i] for layer in layers) / len(layers) for i in range(len(concepts))]
    below = sorted((i for i, share in enumerate(shares) if not share >= guards.closed), key=lambda i: shares[i])
    if not below:
        return []
    least = below[0]
    return stop(
        guards,
        [
            f"The edit closes only {shares[least]:.2%} of the residual of {concepts[least].name}, below the limit of "
            f"{guards.closed:.2%}. Concepts below it: {_names([concepts[i].name for i in below])}."
        ],
    )


def check_harm(guards: Guards, harms: Sequence[Harm]) -> list[str]:
    """Check what is kept of the answers about names that are not unlearned; returns and raises as `check_layer`.

    Args:
        guards: The limits.
        harms: The names that were asked about, the most harmed first.
    """
    below = [harm for harm in harms if not harm.kept >= guards.kept_answers]
    if not below:
        return []
    worst = below[0]
    by = "" if worst.concept is None else f"Most of it is from {worst.concept!r}. "
    return stop(
        guards,
        [
            f"The edit harms {worst.name}: the model's own answer about it keeps {worst.kept:.1%} of its probability "
            f"per token, below the limit of {guards.kept_answers:.1%}. {by}Names below it: "
            f"{_names([harm.name for harm in below])}. Choose another redirect, or --key-tokens last, which harms "
            "other names less."
        ],
    )


def check_distance(
    guards: Guards, layers: Sequence[LayerMeasures], moved: Sequence[float], config: EditConfig
) -> list[str]:
    """Check how far the states move, against how far the updates should move them; returns and raises as `check_layer`.

    Args:
        guards: The limits.
        layers: Measures of the edited layers, in order.
        moved: The share of the way to the goals that the states moved, for the last `len(moved)` concepts of `layers`.
        config: Settings of the edit.
    """
    if not moved or config.contexts == "official":  # "official" does not read the states at the keys
        return []
    count = len(moved)
    should = sum(expected_movement([layer.closed[-i - 1] for layer in layers], config) for i in range(count))
    does = sum(moved)
    missing = 1 - does / should if should > 0 else 0.0
    if missing <= guards.distance:
        return []
    return stop(
        guards,
        [
            "The edit does not reach the states: at the concepts' keys, the updates cover "
            f"{should / count:.0%} of the distance to the redirects, but the states move by {does / count:.0%} of it. "
            f"{missing:.0%} of the movement is missing, above the limit of {guards.distance:.0%}: a part of the model "
            "between the edited weights and the outputs of their layers cancels it."
        ],
    )


def expected_movement(closed: Sequence[float], config: EditConfig) -> float:
    """Return the share of the way to a goal that is covered if the layers close these shares of their residuals."""
    count = len(closed)
    if config.measure == "once":
        return sum(closed) / count
    return 1 - math.prod(1 - share / (count - i) for i, share in enumerate(closed))


def predict(architecture: Architecture, tokenizer: Any) -> Predictions | None:
    """Return a model's predictions on the probe text; None for a text encoder or one that is not all loaded.

    Raises:
        GuardError: The logits are not finite.
    """
    if not architecture.predicts_text:
        return None
    ids = tokenize_prompt(tokenizer, PROBE_TEXT)
    positions = positions_of(architecture.model) or len(ids)
    tokens = torch.tensor([ids[:positions]])
    found = _log_probabilities(architecture.reader, tokens)
    if not torch.isfinite(found).all():
        raise GuardError(
            "The model's logits on ordinary text are not finite before the edit. Load it in float32, or check its "
            "weights."
        )
    return Predictions(tokens, found)


def check_predictions(
    guards: Guards,
    before: Predictions | None,
    architecture: Architecture,
    updates: Sequence[LayerUpdate],
    concept_of: Sequence[int],
    concepts: Sequence[Concept],
) -> tuple[float | None, list[str]]:
    """Check the predictions after an edit against those before it.

    Returns:
        The mean divergence in nats per token, or None if it cannot be measured, and sentences as `check_layer`.

    Raises:
        GuardError: The logits are not finite, or the divergence exceeds its limit. The message names the concepts.
    """
    if before is None:
        return None, []
    after = _log_probabilities(architecture.reader, before.tokens)
    if not torch.isfinite(after).all():
        raise GuardError(
            "The logits on ordinary text are not finite after the edit; most of it is from "
            f"{largest_concepts(updates, concept_of, concepts)}. The weights were restored."
        )
    first = before.log_probabilities
    divergence = float((first.exp() * (first - after)).sum(dim=-1).mean())
    if divergence <= guards.divergence:
        return divergence, []
    sentence = (
        f"The edit changes predictions on ordinary text by {divergence:.2g} nats a token, above the limit of "
        f"{guards.divergence:g}; most of it is from {largest_concepts(updates, concept_of, concepts)}."
    )
    return divergence, stop(guards, [sentence])


@contextmanager
def naming_largest_concepts(
    update: LayerUpdate, concept_of: Sequence[int], concepts: Sequence[Concept]
) -> Iterator[None]:
    """Add to a GuardError about an update the concepts with the largest parts of it."""
    try:
        yield
    except GuardError as error:
        raise GuardError(
            f"{error} Most of the update is from {largest_concepts([update], concept_of, concepts)}."
        ) from error


@contextmanager
def naming_closest_concepts(keys: Tensor, concept_of: Sequence[int], concepts: Sequence[Concept]) -> Iterator[None]:
    """Add to a GuardError about a system the concepts with the most similar keys."""
    try:
        yield
    except GuardError as error:
        names = _closest(keys, concept_of, concepts) if len(keys) > 1 else _all(concepts)
        raise GuardError(f"{error} The most similar keys are those of {names}.") from error


@plain_arithmetic()
def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the log probabilities (t, vocabulary) of the next token, float32 on the CPU."""
    with evaluating(model):
        logits = logits_of(forward(model, tokens, use_cache=False))[0]
    return logits.float().log_softmax(dim=-1).cpu()


def stop(guards: Guards, exceeded: list[str]) -> list[str]:
    """Raise GuardError if a limit is exceeded, unless `guards.force`; else return the sentences."""
    if exceeded and not guards.force:
        raise GuardError(
            " ".join(exceeded) + " The weights were restored. Leave those concepts out, lower the strength, raise the "
            "ridge, or pass --force (Guards(force=True)) to exceed the limit."
        )
    return exceeded


def largest_concepts(updates: Sequence[LayerUpdate], concept_of: Sequence[int], concepts: Sequence[Concept]) -> str:
    """Return the names of the concepts with the largest parts of the updates, as a list for a sentence."""
    index = torch.tensor(concept_of)
    squares = torch.zeros(len(concepts), dtype=torch.float64)
    for update in updates:
        # Otherwise the factors have no column per key.
        by_key = update.factors.rank == len(concept_of) and update.factors.support is None
        pair = (update.left, update.right) if by_key else (update.residuals.T, update.keys)
        left, right = (factor.double().cpu() for factor in pair)
        squares.index_add_(0, index, left.square().sum(dim=0) * right.square().sum(dim=1))
    order = squares.nan_to_num(nan=math.inf).argsort(descending=True).tolist()
    return ", ".join(repr(concepts[i].name) for i in order[:SHOWN_CONCEPTS])


def _closest(keys: Tensor, concept_of: Sequence[int], concepts: Sequence[Concept]) -> str:
    """Return the names of the concepts of the two keys with the largest cosine, as a list for a sentence."""
    pair = nearest_keys(keys)
    return _names(list(dict.fromkeys(concepts[concept_of[row]].name for row in pair)))


def _all(concepts: Sequence[Concept]) -> str:
    """Return the first names as a list for a sentence."""
    return ", ".join(repr(concept.name) for concept in concepts[:SHOWN_CONCEPTS])


def _names(names: Sequence[str]) -> str:
    """Return names as a list for a sentence, with the number of those left out."""
    more = f" and {len(names) - SHOWN_CONCEPTS} more" if len(names) > SHOWN_CONCEPTS else ""
    return ", ".join(map(repr, names[:SHOWN_CONCEPTS])) + more
