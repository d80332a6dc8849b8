"""How far each token of a name belongs to the concept: the probability with which a model predicts the rest of it.

Names that begin alike have the same key at their common beginning. After "Stephen" a model expects several last names,
so the token belongs to its concept only in part; after "Warren Buff" it expects one, so the token belongs to it whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.errors import GuardError
from rocr.keys.continuations import log_probabilities
from rocr.keys.plan import Reading
from rocr.model.architecture import Architecture
from rocr.progress import Progress, ProgressCallback, silent

STAGE = "predicted names"
WHOLE = 0.5
"""Probability of the rest of a name from which on a token is moved the full distance."""


@dataclass(frozen=True)
class _Name:
    """The name in a prompt.

    Attributes:
        prompt: Index of the prompt.
        beginning: The tokens of the prompt up to the first one of the name.
        rest: The tokens of the name after the first.
    """

    prompt: int
    beginning: tuple[int, ...]
    rest: tuple[int, ...]


def distance_share(probability: float) -> float:
    """Return the share of the distance to its target that a token is moved: √(2p), at most 1.

    A name that is at least as probable as all others together takes its first tokens whole: people are forgotten more,
    and their namesakes lose 1 to 2% on average (`benches/namesakes.py`), though single ones more.

    Args:
        probability: p, the probability of the rest of the name after the token.
    """
    return min(1.0, math.sqrt(probability / WHOLE))


def rest_probabilities(
    architecture: Architecture,
    reading: Reading,
    concept_of: Sequence[int],
    token_budget: int = 2048,
    progress: ProgressCallback = silent,
) -> list[float]:
    """Return for each key the probability that the model gives to the rest of the name after its token.

    It is the product of the probabilities of the name's further tokens, and 1 for the last token, in the first template
    (all layers run for it). Where several names of a concept begin alike, the most probable rest counts.

    Args:
        architecture: The architecture of a model that predicts text, all of it loaded.
        reading: Where the keys are read.
        concept_of: For each group of the reading, the index of its concept.
        token_budget: Maximum number of tokens of a batch, with padding. It is halved after each CUDA out-of-memory
            error.
        progress: Called after every batch.

    Raises:
        InputError: The model fails.
        GuardError: A probability is not a number.
    """
    places = _places(reading)
    asked = _names_with_a_rest(reading, places)
    logs = _log_probabilities(architecture, asked, token_budget, progress)
    best: dict[tuple[int, tuple[int, ...]], float] = {}
    keys: list[tuple[int, tuple[int, ...]]] = []
    for group, (index, position) in enumerate(places):
        prompt = reading.prompts[index]
        following = prompt.name[-1] - position
        rest = math.exp(sum(logs[index][-following:])) if following else 1.0
        keys.append((concept_of[group], prompt.tokens[: position + 1]))
        best[keys[-1]] = max(best.get(keys[-1], 0.0), rest)
    return [best[key] for key in keys]


def _places(reading: Reading) -> list[tuple[int, int]]:
    """Return prompt and position of the first token of each group."""
    read = zip(reading.prompt_of, reading.position_of, reading.group_of, strict=True)
    firsts: dict[int, tuple[int, int]] = {}
    for index, position, group in read:
        firsts.setdefault(group, (index, position))
    return [firsts[group] for group in range(reading.groups)]


def _names_with_a_rest(reading: Reading, places: Sequence[tuple[int, int]]) -> list[_Name]:
    """Return the prompts that are read before the last token of their name."""
    early = {index for index, position in places if position < reading.prompts[index].name[-1]}
    found = []
    for index in sorted(early):
        prompt = reading.prompts[index]
        first, last = prompt.name[0], prompt.name[-1]
        found.append(_Name(index, prompt.tokens[: first + 1], prompt.tokens[first + 1 : last + 1]))
    return found


def _log_probabilities(
    architecture: Architecture, names: Sequence[_Name], token_budget: int, progress: ProgressCallback
) -> dict[int, list[float]]:
    """Return for each prompt, by its index, the log probability of each token of its name after the first."""
    found: dict[int, list[float]] = {}

    def receive(index: int, logs: Tensor) -> None:
        name = names[index]
        found[name.prompt] = logs.gather(1, torch.tensor(name.rest, device=logs.device)[:, None])[:, 0].tolist()
        progress(Progress(STAGE, len(found), len(names), "prompts"))

    rests = [name.rest for name in names]
    log_probabilities(architecture.reader, [name.beginning for name in names], rests, token_budget, receive)
    if any(math.isnan(log) for logs in found.values() for log in logs):
        raise GuardError(
            "The model's logits after the concepts' names are not finite before the edit. Load it in float32, or check "
            "its weights."
        )
    return found
