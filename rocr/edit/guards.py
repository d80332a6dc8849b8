"""Limits beyond which an edit would harm the model: it is stopped and undone, and the concepts at fault are named."""

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
from rocr.edit.measures import LayerMeasures
from rocr.edit.update import LayerUpdate
from rocr.errors import GuardError, InputError
from rocr.model.architecture import Architecture, positions_of
from rocr.model.forward import forward, logits_of
from rocr.model.hooks import evaluating
from rocr.model.tokenizer import tokenize_prompt
from rocr.ops.arithmetic import plain_arithmetic

SHOWN_CONCEPTS = 3
PROBE_TEXT = (
    "The river rises in the hills and flows past three small towns before it reaches the sea. In spring, when the "
    "snow melts, the water is high and cold, and the mills along its banks turn day and night. Most families there "
    "keep a garden; they grow beans, onions and a few apple trees. On market day the square is full of people who "
    "sell bread, cloth and tools, and who talk about the weather, the harvest and the price of wool."
)
"""Ordinary prose without a name: an edit of any concept should leave a model's predictions on it alone."""


@dataclass(frozen=True)
class Guards:
    """What an edit must stay within. Ordinary edits stay far from every limit (SmolLM2-135M, 1 to 5 people).

    Attributes:
        relative_norm: largest Frobenius norm of a layer's update over that of its weight. Ordinary: 0.03 to 0.5;
            of an update twice as large as the weight, little is left of the layer.
        surviving: smallest share of a weight's entries that an update changes after rounding. Ordinary: above 0.9
            in float32; below a hundredth the saved model is not the one that was solved for.
        condition: largest condition number of the system solved. Ordinary: below 100; at 1e7 the rounding of
            float32 keys alone decides the result.
        closed: smallest share of a concept's residuals that is closed, mean over the layers. Ordinary: above 0.4;
            below zero the concept moves away from its redirect.
        distance: largest share that is missing, mean over the concepts, of the way that the updates should move the
            states according to what they close. Ordinary: below 0.5; near 1 the edit does not arrive at the states that
            it aims at: something between the edited weights and those states undoes it. Not looked at with the contexts
            "official", where states are not read at the keys.
        divergence: largest mean Kullback-Leibler divergence on ordinary prose, in nats a token, of the model's
            predictions after the edit from those before. Ordinary: below 0.05; at 1 every other word changes.
        concepts: most concepts of one edit, with those that it keeps; `force` does not pass it. It bounds time and
            memory, which were measured up to this number (README).
        force: whether an edit that passes a limit goes on; what it passed is recorded in its report. Values that
            are not finite stop it all the same.

    Raises:
        InputError: a limit is not a number.
    """

    relative_norm: float = 2.0
    surviving: float = 0.01
    condition: float = 1e7
    closed: float = 0.0
    distance: float = 0.7
    divergence: float = 1.0
    concepts: int = MAX_CONCEPTS
    force: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or math.isnan(value):
                raise InputError(f"The limit {field.name} must be a number, not {value!r}.")


@dataclass(frozen=True)
class Predictions:
    """What a model predicts on the probe text.

    Attributes:
        tokens: (1, t) int64 token ids of the text.
        log_probabilities: (t, vocabulary) float32 on the CPU.
    """

    tokens: Tensor
    log_probabilities: Tensor


def check_layer(
    guards: Guards, measures: LayerMeasures, update: LayerUpdate, concept_of: Sequence[int], concepts: Sequence[Concept]
) -> list[str]:
    """Hold the numbers of a layer to the limits.

    Returns:
        A sentence for each limit that was passed, which is empty unless `guards.force`.

    Raises:
        GuardError: a limit was passed; names the concepts that did it.
    """
    passed = []
    where = f"at layer {measures.layer}"
    if not measures.relative_norm <= guards.relative_norm:
        passed.append(
            f"The update {where} has {measures.relative_norm:.2g} times the norm of the weight, above the limit of "
            f"{guards.relative_norm:g}; most of it is from {_largest([update], concept_of, concepts)}."
        )
    if not measures.surviving >= guards.surviving:
        passed.append(
            f"Rounding to {update.applied.dtype if update.applied else 'the dtype'} leaves {measures.surviving:.2%} of "
            f"the weight changed {where}, below the limit of {guards.surviving:.2%}, for {_all(concepts)}; load the "
            "model in float32."
        )
    if not measures.condition <= guards.condition:
        passed.append(
            f"The system {where} has a condition number of {measures.condition:.2g}, above the limit of "
            f"{guards.condition:.2g}: the keys of {_closest(update.keys, concept_of, concepts)} are all but the same; "
            "raise the ridge."
        )
    return _stop(guards, passed)


def check_closed(guards: Guards, layers: Sequence[LayerMeasures], concepts: Sequence[Concept]) -> list[str]:
    """Hold the share of each concept's residuals that was closed, mean over the layers, to its limit.

    Returns, raises: as `check_layer`.
    """
    shares = [sum(layer.closed[i] for layer in layers) / len(layers) for i in range(len(concepts))]
    short = [i for i, share in enumerate(shares) if not share >= guards.closed]
    if not short:
        return []
    least = min(short, key=lambda i: shares[i])
    names = _names([concepts[i].name for i in sorted(short, key=lambda i: shares[i])])
    return _stop(
        guards,
        [
            f"The edit closes only {shares[least]:.2%} of the residual of {concepts[least].name}, below the limit of "
            f"{guards.closed:.2%}; this concerns {names}."
        ],
    )


def check_distance(
    guards: Guards, layers: Sequence[LayerMeasures], distance: Sequence[float], config: EditConfig
) -> list[str]:
    """Hold what is left of the way to the redirects to what the updates should leave of it.

    Args:
        guards: the limits.
        layers: numbers of the edited layers, in order.
        distance: for each of the last concepts that `layers` knows, the share of the way that is left.
        config: the settings of the edit.

    Returns, raises: as `check_layer`.
    """
    if not distance or config.contexts == "official":  # then the states are not those at the keys
        return []
    missed = 0.0
    expected = [expected_distance([layer.closed[-i - 1] for layer in layers], config) for i in range(len(distance))]
    should, does = (sum(1 - share for share in shares) for shares in (expected, distance))
    if should > 0:
        missed = 1 - does / should
    if missed <= guards.distance:
        return []
    return _stop(
        guards,
        [
            f"The edit does not arrive: at their keys the updates cover {should / len(distance):.0%} of the way to the "
            f"redirects, but the states move by {does / len(distance):.0%} of it. {missed:.0%} is missing, above the "
            f"limit of {guards.distance:.0%}: what lies between the edited weights and the layers' outputs undoes it."
        ],
    )


def expected_distance(closed: Sequence[float], config: EditConfig) -> float:
    """Share of the way to a target that updates leave which close these shares of their residuals, layer by layer."""
    count = len(closed)
    if config.measure == "once":
        return 1 - sum(closed) / count
    return math.prod(1 - share / (count - i) for i, share in enumerate(closed))


def predict(architecture: Architecture, tokenizer: Any) -> Predictions | None:
    """What a model predicts on the probe text; None where a part of the model was never loaded.

    Raises:
        GuardError: the logits are not finite.
    """
    if any(parameter.device.type == "meta" for parameter in architecture.model.parameters()):
        return None
    ids = tokenize_prompt(tokenizer, PROBE_TEXT)
    positions = positions_of(architecture.model) or len(ids)
    tokens = torch.tensor([ids[:positions]])
    found = _log_probabilities(architecture.model, tokens)
    if not torch.isfinite(found).all():
        raise GuardError("The model's logits on ordinary text are not finite before the edit; it cannot be edited.")
    return Predictions(tokens, found)


def check_predictions(
    guards: Guards,
    before: Predictions | None,
    architecture: Architecture,
    updates: Sequence[LayerUpdate],
    concept_of: Sequence[int],
    concepts: Sequence[Concept],
) -> tuple[float | None, list[str]]:
    """Hold the predictions after an edit against those before it.

    Returns:
        The mean divergence in nats a token (None where it could not be measured), and sentences as `check_layer`.

    Raises:
        GuardError: the logits are not finite, or too far from those before; names the concepts.
    """
    if before is None:
        return None, []
    after = _log_probabilities(architecture.model, before.tokens)
    if not torch.isfinite(after).all():
        raise GuardError(
            "The logits on ordinary text are not finite after the edit; most of it is from "
            f"{_largest(updates, concept_of, concepts)}. The model has its first weights again."
        )
    first = before.log_probabilities
    divergence = float((first.exp() * (first - after)).sum(dim=-1).mean())
    if divergence <= guards.divergence:
        return divergence, []
    sentence = (
        f"The edit changes predictions on ordinary text by {divergence:.2g} nats a token, above the limit of "
        f"{guards.divergence:g}; most of it is from {_largest(updates, concept_of, concepts)}."
    )
    return divergence, _stop(guards, [sentence])


@contextmanager
def with_culprits(update: LayerUpdate, concept_of: Sequence[int], concepts: Sequence[Concept]) -> Iterator[None]:
    """Add to a GuardError about an update whose it is."""
    try:
        yield
    except GuardError as error:
        raise GuardError(f"{error} Most of the update is from {_largest([update], concept_of, concepts)}.") from error


@contextmanager
def with_closest(keys: Tensor, concept_of: Sequence[int], concepts: Sequence[Concept]) -> Iterator[None]:
    """Add to a GuardError about a system of keys whose are the nearest to each other."""
    try:
        yield
    except GuardError as error:
        names = _closest(keys, concept_of, concepts) if len(keys) > 1 else _all(concepts)
        raise GuardError(f"{error} The keys that are most alike are those of {names}.") from error


@plain_arithmetic()
def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    with evaluating(model):
        logits = logits_of(forward(model, tokens, use_cache=False))[0]
    return logits.float().log_softmax(dim=-1).cpu()


def _stop(guards: Guards, passed: list[str]) -> list[str]:
    if passed and not guards.force:
        raise GuardError(
            " ".join(passed) + " The model has its first weights again. Leave those concepts out, lower the strength, "
            "raise the ridge, or pass --force (Guards(force=True)) to go on all the same."
        )
    return passed


def _largest(updates: Sequence[LayerUpdate], concept_of: Sequence[int], concepts: Sequence[Concept]) -> str:
    """The concepts with the largest parts of some updates."""
    index = torch.tensor(concept_of)
    squares = torch.zeros(len(concepts), dtype=torch.float64)
    for update in updates:
        by_key = update.factors.rank == len(concept_of)  # else the factors are of another inner size
        pair = (update.factors.left, update.factors.right) if by_key else (update.residuals.T, update.keys)
        left, right = (factor.double().cpu() for factor in pair)
        squares.index_add_(0, index, left.square().sum(dim=0) * right.square().sum(dim=1))
    order = squares.nan_to_num(nan=math.inf).argsort(descending=True).tolist()
    return _names([concepts[i].name for i in order[:SHOWN_CONCEPTS]], len(concepts))


def _closest(keys: Tensor, concept_of: Sequence[int], concepts: Sequence[Concept]) -> str:
    """The concepts of the two keys that point most nearly the same way."""
    pair = nearest_keys(keys)
    return _names(list(dict.fromkeys(concepts[concept_of[row]].name for row in pair)))


def _all(concepts: Sequence[Concept]) -> str:
    return _names([concept.name for concept in concepts[:SHOWN_CONCEPTS]], len(concepts))


def _names(names: Sequence[str], total: int | None = None) -> str:
    shown = ", ".join(map(repr, names[:SHOWN_CONCEPTS]))
    rest = (total if total is not None else len(names)) - len(names[:SHOWN_CONCEPTS])
    return shown if rest <= 0 or total is not None else f"{shown} and {rest} more"
