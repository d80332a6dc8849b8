"""Choose the redirect of a concept that names none: the candidate with which it has least in common in a model.

An edited model reads the redirect in place of the concept, and still answers right where both have the same answer. The
candidates are therefore names that have little in common with most others, and the choice compares how the unedited
model continues sentences about them and about the concept. No edit is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from rocr.concepts import AUTO, Concept, Kind, folded
from rocr.edit.controls import load_names, without_concepts
from rocr.errors import InputError
from rocr.keys.continuations import log_probabilities
from rocr.model.architecture import Architecture
from rocr.model.tokenizer import tokenize_prompt
from rocr.progress import Progress, ProgressCallback, silent

CANDIDATES: Mapping[Kind, Sequence[str]] = {
    "person": ("Sitting Bull", "Confucius", "Crazy Horse", "Bruce Lee"),
    "thing": ("kimchi", "Stonehenge", "Uluru"),
}
"""The candidates of each kind, that with least in common with eight people, or fifteen things, of the package's probes
first (`benches/remote_redirects.py`)."""
INVENTED: Mapping[Kind, str] = {"person": "Tarvin Okelo", "thing": "Velorin"}
"""An invented name of each kind, which is taken if every candidate shares a word with a concept."""
BEGINNINGS: Mapping[Kind, Sequence[str]] = {
    "person": (
        "{} was born in", "{} was born in the year", "{} is best known for", "{} was a", "The nationality of {} is",
        "{} died in", "{} worked in the field of", "{} lived in the", "The most famous work of {} is",
        "The profession of {} is",
    ),
    "thing": (
        "{} is a", "{} is known for", "{} is located in", "{} is made of", "{} began in the year", "{} was created by",
        "{} belongs to", "{} is used for", "The most important part of {} is", "The history of {} begins with",
    ),
}  # fmt: skip
"""Sentences about a name whose next token is compared."""
MAX_ASKED = 50
"""Largest number of concepts that are compared; the others get the candidates of their kind in turn."""
UNRELATED = 5
"""Number of listed names that have nothing to do with a concept."""


def with_redirects(
    architecture: Architecture,
    tokenizer: Any,
    concepts: Sequence[Concept],
    progress: ProgressCallback = silent,
) -> list[Concept]:
    """Return concepts with a redirect chosen for each whose redirect is "auto".

    The candidates are those of the concept's kind that share no word with any concept. For each name, the model
    predicts the token that continues some sentences about it. The candidate is chosen whose predictions have least in
    common with those about the concept: the mean over the sentences of the sum over the tokens of the smaller of the
    two probabilities. Of more than 50 concepts, 50 at equal distances are compared.

    Args:
        architecture: The model before the edit, with its kind.
        tokenizer: Its tokenizer.
        concepts: The concepts.
        progress: Called after every name.

    Returns:
        The concepts, in their order. Those that name a redirect keep it.

    Raises:
        InputError: The model predicts no text or is loaded only in part, or the tokenizer or the model's code fails.
    """
    open_ones = [concept for concept in concepts if concept.redirect == AUTO]
    if not open_ones:
        return list(concepts)
    if not architecture.predicts_text:
        raise InputError(
            'The redirect "auto" needs the predictions of the model, but it predicts no text or is loaded only in '
            "part: give each concept a redirect."
        )
    listed = load_names()
    kinds = {concept.name: kind_of(concept, listed) for concept in open_ones}
    compared = open_ones[:: math.ceil(len(open_ones) / MAX_ASKED)]
    candidates = {kind: candidates_of(kind, concepts) for kind in dict.fromkeys(kinds.values())}
    total = sum(map(len, candidates.values())) + len(compared)
    done = 0

    def predictions(name: str, kind: Kind) -> Tensor:
        nonlocal done
        found = next_tokens(architecture, tokenizer, [name], BEGINNINGS[kind])[0]
        done += 1
        progress(Progress("redirects", done, total, "names"))
        return found

    of_candidates = {kind: {name: predictions(name, kind) for name in names} for kind, names in candidates.items()}
    chosen: dict[str, str] = {}
    for concept in compared:
        kind = kinds[concept.name]
        own = predictions(concept.name, kind)
        common = {name: in_common(own, theirs) for name, theirs in of_candidates[kind].items()}
        chosen[concept.name] = min(common, key=common.__getitem__)
    in_turn = {kind: cycle(names) for kind, names in candidates.items()}
    return [
        replace(concept, redirect=chosen.get(concept.name) or next(in_turn[kinds[concept.name]]))
        if concept.redirect == AUTO
        else concept
        for concept in concepts
    ]


def next_tokens(architecture: Architecture, tokenizer: Any, names: Sequence[str], sentences: Sequence[str]) -> Tensor:
    """Return (names, sentences, vocabulary) probabilities of the token that continues each sentence about a name."""
    prompts = [tokenize_prompt(tokenizer, sentence.format(name)) for name in names for sentence in sentences]
    rows = log_probabilities(architecture.reader, prompts, [()] * len(prompts))
    return torch.cat(rows).exp().reshape(len(names), len(sentences), -1)


def in_common(one: Tensor, other: Tensor) -> float:
    """Return what two sets of predictions (sentences, vocabulary) have in common: 1 less their total variation."""
    return float(torch.minimum(one, other).sum(dim=1).mean())


def kind_of(concept: Concept, listed: Mapping[str, str] | None = None) -> Kind:
    """Return the kind of a concept: its own, or that of its name on the package's list, or else "person".

    Args:
        concept: The concept.
        listed: The list, as `load_names` returns it, if it was read already.
    """
    if concept.kind is not None:
        return concept.kind
    kinds = load_names() if listed is None else listed
    return "thing" if kinds.get(concept.name, "person") != "person" else "person"


def candidates_of(kind: Kind, concepts: Sequence[Concept]) -> list[str]:
    """Return the candidates of a kind that share no word with any concept; an invented name if there is none."""
    return _apart(CANDIDATES[kind], concepts) or [INVENTED[kind]]


def unrelated_names(kind: Kind, concepts: Sequence[Concept]) -> list[str]:
    """Return five names of the package's list, of a kind, at equal distances, that share no word with any concept."""
    of_kind = [name for name, listed in load_names().items() if (listed == "person") == (kind == "person")]
    apart = _apart(of_kind, concepts)
    step = max(1, len(apart) // UNRELATED)
    return apart[step // 2 :: step][:UNRELATED]


def _apart(names: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Return the names that are none of the concepts and share no word with any."""
    words = {folded(word) for concept in concepts for name in concept.names for word in name.split()}
    others = without_concepts(names, concepts)
    return [name for name in others if not words.intersection(folded(word) for word in name.split())]
