"""Short names: beginnings that stand for a whole name in a model, as "Galileo" stands for Galileo Galilei.

The model seldom continues such a beginning to the whole name, since it is a name by itself. The token schedule, which
goes by that probability, would leave it to its own meaning, and with it most of what the model knows of the concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rocr.concepts import Concept
from rocr.edit.automatic_redirects import BEGINNINGS, in_common, kind_of, next_tokens
from rocr.keys.plan import Reading
from rocr.model.architecture import Architecture
from rocr.model.tokenizer import calling_tokenizer
from rocr.progress import Progress, ProgressCallback, silent

STANDS_FOR = 0.5
"""A beginning stands for a name from this share of the way from redirect to name on, by the total variation of what the
model predicts about them. "Galileo" is beyond it, and "Isaac" of Isaac Newton is not (`benches/short_names.py`)."""
LEAST_APART = 0.2
"""Smallest total variation between the predictions about name and redirect with which beginnings are compared."""
SENTENCES = 4
"""Number of sentences whose next token is compared."""
MAX_CONCEPTS = 50
"""Largest number of concepts whose beginnings are compared. Longer lists are moved by the token schedule alone."""
STAGE = "short names"


def short_name_keys(
    architecture: Architecture,
    tokenizer: Any,
    reading: Reading,
    concept_of: Sequence[int],
    concepts: Sequence[Concept],
    among: Sequence[bool],
    progress: ProgressCallback = silent,
) -> list[bool]:
    """Return for each key whether it is that of the last token of a short name.

    Args:
        architecture: A model that predicts text, all of it loaded.
        tokenizer: Its tokenizer.
        reading: Where the keys are read.
        concept_of: For each key, the index of its concept.
        concepts: The concepts.
        among: For each key, whether it is asked about; the others are not.
        progress: Called after every concept that is compared.

    Returns:
        False for every key if there are more than 50 concepts.

    Raises:
        InputError: The tokenizer or the model's code fails.
    """
    found = [False] * reading.groups
    if len(concepts) > MAX_CONCEPTS:
        return found
    texts = _texts_up_to(tokenizer, reading)
    places: dict[int, dict[str, list[int]]] = {}
    for key, (text, index) in enumerate(zip(texts, concept_of, strict=True)):
        if among[key] and text in beginnings_of(concepts[index].name):
            places.setdefault(index, {}).setdefault(text, []).append(key)
    for done, (index, keys_of) in enumerate(places.items(), 1):
        for text in short_names(architecture, tokenizer, concepts[index], list(keys_of)):
            for key in keys_of[text]:
                found[key] = True
        progress(Progress(STAGE, done, len(places), "concepts"))
    return found


def short_names(architecture: Architecture, tokenizer: Any, concept: Concept, beginnings: Sequence[str]) -> list[str]:
    """Return the beginnings of a concept's name that stand for it in a model; arguments and errors as `nearness`."""
    near = nearness(architecture, tokenizer, concept, beginnings)
    return [beginning for beginning, share in near.items() if share >= STANDS_FOR]


def nearness(
    architecture: Architecture, tokenizer: Any, concept: Concept, beginnings: Sequence[str]
) -> dict[str, float]:
    """Return how near each beginning is to a concept's name, from 0 as the redirect or less to 1 as the name itself.

    The model predicts the token that continues some sentences about the name, the redirect and each beginning. The
    result is 1 less the total variation between the predictions about a beginning and about the name, as a share of
    that between the redirect and the name.

    Args:
        architecture: A model that predicts text, all of it loaded.
        tokenizer: Its tokenizer.
        concept: The concept.
        beginnings: Words that its name begins with.

    Returns:
        0 for all in a model that predicts alike of name and redirect.

    Raises:
        InputError: The tokenizer or the model's code fails.
    """
    sentences = BEGINNINGS[kind_of(concept)][:SENTENCES]
    names = [concept.name, concept.redirect, *beginnings]
    whole, redirect, *others = next_tokens(architecture, tokenizer, names, sentences)
    apart = 1 - in_common(whole, redirect)
    if apart < LEAST_APART:
        return dict.fromkeys(beginnings, 0.0)
    return {
        beginning: max(0.0, 1 - (1 - in_common(whole, predictions)) / apart)
        for beginning, predictions in zip(beginnings, others, strict=True)
    }


def beginnings_of(name: str) -> list[str]:
    """Return the whole words that a name begins with, without the name itself."""
    words = name.split()
    return [" ".join(words[:count]) for count in range(1, len(words))]


def _texts_up_to(tokenizer: Any, reading: Reading) -> list[str]:
    """Return for each key the text of the name up to its token, in the first prompt that it is read in."""
    texts: dict[int, str] = {}
    for index, position, key in zip(reading.prompt_of, reading.position_of, reading.group_of, strict=True):
        if key not in texts:
            prompt = reading.prompts[index]
            with calling_tokenizer(tokenizer):
                texts[key] = str(tokenizer.decode(list(prompt.tokens[prompt.name[0] : position + 1]))).strip()
    return [texts[key] for key in range(reading.groups)]
