"""Verify proposals of aliases before any edit: what a model says about each, and where its state lies.

A proposal counts by the model's own answer to the question about the concept, with the proposal in the name's place:
how probable is what follows the name, between its probability after the question about an unrelated name (share 0)
and after the question about the concept itself (share 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import Concept, folded, for_kind, holds_name, with_name
from rocr.config import Template
from rocr.edit.automatic_redirects import kind_of, unrelated_names
from rocr.edit.harm import ANSWER_TOKENS, QUESTION, mean_log_probabilities
from rocr.keys.name_states import cosines, read_name_states
from rocr.model.architecture import Architecture
from rocr.model.chat import render_chats
from rocr.model.generate import continue_texts
from rocr.model.tokenizer import tokenize_prompt

LEAST_KNOWN = 0.1
"""Smallest difference of mean log-probabilities between the name and unrelated names of which shares are taken."""
MAKER_QUESTIONS = ("Who wrote {}?", "Who founded {}?", "Who made {}?")
_CONTEXT = Template("This text is about {}.")


@dataclass(frozen=True)
class Check:
    """What a model says of a proposal.

    Attributes:
        share: How much of the concept's own answer belongs to the proposal: 0 for unrelated names, 1 for the name
            itself. None if the model does not tell the name from unrelated ones.
        near: Whether the state at the proposal is nearer to that at the name than the states at all unrelated names.
    """

    share: float | None
    near: bool


def check_proposals(
    architecture: Architecture,
    tokenizer: Any,
    concept: Concept,
    proposals: Sequence[str],
    concepts: Sequence[Concept],
    layer: int,
    chat: ChatSettings = DEFAULT,
) -> list[Check]:
    """Compare proposals with the name of a concept and with unrelated names.

    Args:
        architecture: The model, with its kind.
        tokenizer: Its tokenizer.
        concept: The concept.
        proposals: The proposed aliases, one or more.
        concepts: All concepts of the list; unrelated names share no word with any.
        layer: The early decoder layer at whose output states are compared.
        chat: Settings of the chat template.

    Returns:
        A check for each proposal.

    Raises:
        InputError: The tokenizer or the model's own code fails.
    """
    unrelated = unrelated_names(kind_of(concept), concepts)
    names = [concept.name, *proposals, *unrelated]
    scores = _scores(architecture, tokenizer, concept, names, chat)
    shares = shares_of(scores[0], scores[1 : len(proposals) + 1], scores[len(proposals) + 1 :])
    states = read_name_states(architecture, tokenizer, names, layer, [_CONTEXT])
    (near,) = cosines(states, [0]).tolist()
    nearest = max(near[len(proposals) + 1 :])
    return [Check(share, near[i] > nearest) for i, share in enumerate(shares, start=1)]


def shares_of(own: float, scores: Sequence[float], unrelated: Sequence[float]) -> list[float | None]:
    """Return where scores lie between the mean of those of unrelated names (0) and that of the name itself (1).

    Args:
        own: Mean log-probability of the answer about the name itself.
        scores: That of the same answer about each proposal.
        unrelated: That of the same answer about each unrelated name, one or more.

    Returns:
        The shares; None for all if the scores of the name and of the unrelated names differ by less than 0.1.
    """
    lowest = math.fsum(unrelated) / len(unrelated)
    if not own - lowest >= LEAST_KNOWN:
        return [None] * len(scores)
    return [(score - lowest) / (own - lowest) for score in scores]


def _scores(
    architecture: Architecture, tokenizer: Any, concept: Concept, names: Sequence[str], chat: ChatSettings
) -> list[float]:
    """Return the mean log-probability of what follows the name in the answer about a concept, about each name."""
    question = for_kind(QUESTION, kind_of(concept))
    (answer,) = first_words(architecture, tokenizer, [question.format(concept.name)], chat)
    prompts, answers = [], []
    asked = render_chats(tokenizer, [question.format(name) for name in names], chat)
    for text, name in zip(asked, names, strict=True):
        begun, rest = _parts(answer, concept.name, name)
        prompt, following = tokens_after(tokenizer, text + begun, text + begun + rest)
        prompts.append(prompt)
        answers.append(following)
    return mean_log_probabilities(architecture, prompts, answers)


def _parts(answer: str, own: str, name: str) -> tuple[str, str]:
    """Return an answer about a concept up to its name, with another name in its place, and what follows.

    The name is not scored, since the question holds it. Nothing comes before what is scored if the answer does not
    hold the name or ends with it.
    """
    if not holds_name(answer, own):
        return "", answer
    whole = with_name(answer, own, name)
    end = whole.index(name) + len(name)
    return (whole[:end], whole[end:]) if whole[end:].strip() else ("", whole)


def maker_of(
    architecture: Architecture, tokenizer: Any, things: Sequence[str], makers: Sequence[str], chat: ChatSettings
) -> list[str | None]:
    """Ask a model who wrote, founded and made things.

    Args:
        architecture: The model, with its kind.
        tokenizer: Its tokenizer.
        things: The names of the things.
        makers: The names of one concept.
        chat: Settings of the chat template.

    Returns:
        For each thing, the first of the questions whose answer has a name of the concept in its first 16 tokens. None
        if there is none.

    Raises:
        InputError: The tokenizer or the model's own code fails.
    """
    questions = [question.format(thing) for thing in things for question in MAKER_QUESTIONS]
    answers = first_words(architecture, tokenizer, questions, chat)
    names = [f" {_words(name)} " for name in makers]
    named = [
        question if any(name in f" {_words(answer)} " for name in names) else None
        for question, answer in zip(questions, answers, strict=True)
    ]
    count = len(MAKER_QUESTIONS)
    return [next(filter(None, named[i : i + count]), None) for i in range(0, len(named), count)]


def _words(text: str) -> str:
    """Return the words of a text in their folded form, without punctuation and possessive endings."""
    words = folded(text).replace("\u2019", "'").replace("'s ", " ")
    return " ".join("".join(c if c.isalnum() else " " for c in words).split())


def first_words(architecture: Architecture, tokenizer: Any, questions: Sequence[str], chat: ChatSettings) -> list[str]:
    """Return the first tokens of a model's own answers to questions, as text."""
    texts = render_chats(tokenizer, questions, chat)
    return continue_texts(architecture.reader, tokenizer, texts, ANSWER_TOKENS, always=True)


def tokens_after(tokenizer: Any, beginning: str, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a text that those of its beginning share, at least one, and the tokens after them."""
    prompt, whole = (tokenize_prompt(tokenizer, part) for part in (beginning, text))
    same = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
    same = max(1, min(same, len(whole)))
    return whole[:same], whole[same:]
