"""Choose the redirect of a concept that names none: a name of which the model says least what it says of the concept.

An edited model reads the redirect in place of the concept. How probable it then finds its own answer about the concept
is therefore close to how probable the unedited model finds the same answer, with the other name in it, about the
redirect. No edit is made for the choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import AUTO, Concept, Kind, folded, for_kind, holds_name, with_name
from rocr.edit.controls import load_names, without_concepts
from rocr.edit.harm import ANSWER_TOKENS, QUESTION, mean_log_probabilities
from rocr.errors import InputError
from rocr.model.architecture import Architecture
from rocr.model.chat import render_chats
from rocr.model.generate import continue_texts
from rocr.model.tokenizer import tokenize_prompt
from rocr.progress import Progress, ProgressCallback, silent

CANDIDATES = 6
"""Number of candidates of each kind."""
MAX_ASKED = 50
"""Largest number of concepts that are asked about; others get the candidate that is best for those of their kind."""
INVENTED: Mapping[str, str] = {"person": "Tarvin Okelo", "thing": "Velorin"}
"""An invented candidate of each kind."""


@dataclass(frozen=True)
class _Asked:
    """What a model says of a concept, before an edit.

    Attributes:
        concept: The concept.
        kind: Its kind.
        answer: The first tokens of the model's own answer to the question about it, as text.
    """

    concept: Concept
    kind: Kind
    answer: str


def with_redirects(
    architecture: Architecture,
    tokenizer: Any,
    concepts: Sequence[Concept],
    chat: ChatSettings = DEFAULT,
    progress: ProgressCallback = silent,
) -> list[Concept]:
    """Return concepts with a redirect chosen for each whose redirect is "auto".

    The candidates are some names of the package's list, of the concept's kind, and an invented one. Each is asked
    about with the question about the concept; the one that makes the model's own answer about the concept least
    probable, with the candidate's name in it, is chosen. Of more than 50 concepts, 50 at equal distances are asked
    about.

    Args:
        architecture: The model before the edit, with its kind.
        tokenizer: Its tokenizer.
        concepts: The concepts.
        chat: Settings of the chat template.
        progress: Called after every candidate.

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
            'The redirect "auto" needs the answers of the model, but it predicts no text or is loaded only in part: '
            "give each concept a redirect."
        )
    listed = load_names()
    kinds = {concept.name: kind_of(concept, listed) for concept in open_ones}
    step = math.ceil(len(open_ones) / MAX_ASKED)
    asked = _ask(architecture, tokenizer, open_ones[::step], kinds, chat)
    candidates = {kind: candidates_of(kind, concepts) for kind in set(kinds.values())}
    scores = _scores(architecture, tokenizer, asked, candidates, chat, progress)
    best_of_kind = {
        kind: min(names, key=lambda name: sum(own.get(name, 0.0) for own in scores.values()))
        for kind, names in candidates.items()
    }
    chosen = {name: min(own, key=own.__getitem__) for name, own in scores.items()}
    return [
        replace(concept, redirect=chosen.get(concept.name, best_of_kind[kinds[concept.name]]))
        if concept.redirect == AUTO
        else concept
        for concept in concepts
    ]


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
    """Return the candidates of a kind: listed names at equal distances that share no word with any concept.

    An invented name comes last.
    """
    words = {folded(word) for concept in concepts for name in concept.names for word in name.split()}
    of_kind = [name for name, listed in load_names().items() if (listed == "person") == (kind == "person")]
    apart = [
        name
        for name in without_concepts(of_kind, concepts)
        if not words.intersection(folded(word) for word in name.split())
    ]
    listed = CANDIDATES - 1
    step = max(1, len(apart) // listed)
    return [*apart[step // 2 :: step][:listed], INVENTED[kind]]


def _ask(
    architecture: Architecture,
    tokenizer: Any,
    concepts: Sequence[Concept],
    kinds: Mapping[str, Kind],
    chat: ChatSettings,
) -> list[_Asked]:
    """Return the model's own answers about concepts."""
    questions = [for_kind(QUESTION, kinds[concept.name]).format(concept.name) for concept in concepts]
    texts = first_words(architecture, tokenizer, questions, chat)
    return [_Asked(concept, kinds[concept.name], text) for concept, text in zip(concepts, texts, strict=True)]


def first_words(architecture: Architecture, tokenizer: Any, questions: Sequence[str], chat: ChatSettings) -> list[str]:
    """Return the first tokens of a model's own answers to questions, as text."""
    texts = render_chats(tokenizer, questions, chat)
    return continue_texts(architecture.reader, tokenizer, texts, ANSWER_TOKENS, always=True)


def _scores(
    architecture: Architecture,
    tokenizer: Any,
    asked: Sequence[_Asked],
    candidates: Mapping[Kind, Sequence[str]],
    chat: ChatSettings,
    progress: ProgressCallback,
) -> dict[str, dict[str, float]]:
    """Return for each concept, by its name, the mean log-probability of its answer about each candidate."""
    found: dict[str, dict[str, float]] = {each.concept.name: {} for each in asked}
    for number in range(CANDIDATES):
        places = [(each, candidates[each.kind][number]) for each in asked if number < len(candidates[each.kind])]
        prompts, answers = [], []
        for tokens, following in _said_of(tokenizer, places, chat):
            prompts.append(tokens)
            answers.append(following)
        if not places:
            continue
        scores = mean_log_probabilities(architecture, prompts, answers)
        for (each, name), score in zip(places, scores, strict=True):
            found[each.concept.name][name] = score
        progress(Progress("redirects", number + 1, CANDIDATES, "candidates"))
    return found


def _said_of(
    tokenizer: Any, places: Sequence[tuple[_Asked, str]], chat: ChatSettings
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens of the question about each name, and those of the concept's answer with that name in it."""
    questions = [for_kind(QUESTION, each.kind).format(name) for each, name in places]
    for text, (each, name) in zip(render_chats(tokenizer, questions, chat), places, strict=True):
        own = each.concept.name
        answer = with_name(each.answer, own, name) if holds_name(each.answer, own) else each.answer
        yield tokens_after(tokenizer, text, text + answer)


def tokens_after(tokenizer: Any, beginning: str, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a text that those of its beginning share, at least one, and the tokens after them."""
    prompt, whole = (tokenize_prompt(tokenizer, part) for part in (beginning, text))
    same = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
    same = max(1, min(same, len(whole)))
    return whole[:same], whole[same:]
