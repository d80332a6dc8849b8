"""Harm to names that are not unlearned: whether an edited model still gives its own answers about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rocr.chat_settings import ChatSettings
from rocr.concepts import for_kind
from rocr.io.json_values import numbers_of, text_of
from rocr.keys.continuations import log_probabilities
from rocr.model.architecture import Architecture
from rocr.model.chat import render_chats
from rocr.model.generate import continue_greedily, reporting
from rocr.model.tokenizer import calling_tokenizer, tokenize_prompt
from rocr.progress import Progress, ProgressCallback, silent

MAX_ASKED = 5
"""Largest number of names that are asked about: those whose outputs the edit moves most."""
ANSWER_TOKENS = 16
KNOWN = 0.1
"""A model gives its own greedy answer at least this probability per token if it knows anything of a name."""
HARMED = 0.8
"""A name is harmed if the edit keeps less than this share of the probability per token of the answer."""
QUESTION = "Who is {}?"
STAGE = "answers about names"


@dataclass(frozen=True)
class Harm:
    """A name about which an edited model answers otherwise.

    Attributes:
        name: The name.
        concept: The concept whose part of the update moves the outputs at the name most. None if it was not measured.
        before: Probability per token, exp(mean log-probability), that the model before the edit gives to its own
            answer to "Who is NAME?", the first 16 tokens of it.
        after: Probability per token that the edited model gives to the same answer.
        answer: The answer.
    """

    name: str
    concept: str | None
    before: float
    after: float
    answer: str

    @property
    def kept(self) -> float:
        """The share of the probability per token that is left.

        If the edit changes nothing, it is 1 to the rounding of the model: different passes give `before` and `after`.
        """
        return self.after / self.before

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Harm:
        """Return the inverse of `to_json`; raises as `EditReport.from_json`."""
        found = cls(**values)
        for field in ("name", "concept", "answer"):
            if field != "concept" or found.concept is not None:
                text_of(getattr(found, field), field)
        numbers_of([found.before, found.after], "before and after", 2)
        if not found.before > 0:
            raise ValueError(f"before is {found.before:g}")
        return found


@dataclass(frozen=True)
class OwnAnswers:
    """A model's own answers to questions about names, before an edit.

    Attributes:
        names: The names, with the concept for which each is asked about.
        prompts: Token ids of the questions.
        answers: Token ids of the first tokens of the answers.
        texts: The answers as text.
        before: Mean log-probability of the tokens of each answer.
    """

    names: list[tuple[str, str | None]]
    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    before: list[float]

    def harms(self, architecture: Architecture) -> list[Harm]:
        """Return what an edited model makes of the answers, the most harmed name first.

        Names of which the model knew nothing are left out.
        """
        after = mean_log_probabilities(architecture, self.prompts, self.answers)
        rows = zip(self.names, self.before, after, self.texts, strict=True)
        harms = (Harm(*name, math.exp(old), math.exp(new), text) for name, old, new, text in rows)
        return sorted((harm for harm in harms if harm.before >= KNOWN), key=lambda harm: harm.kept)


def read_own_answers(
    architecture: Architecture,
    tokenizer: Any,
    names: Sequence[tuple[str, str | None]],
    things: Sequence[bool],
    chat: ChatSettings,
    progress: ProgressCallback = silent,
) -> OwnAnswers | None:
    """Ask a model about names before an edit.

    Args:
        architecture: The model, with its kind.
        tokenizer: Its tokenizer.
        names: The names, with the concept for which each is asked about.
        things: Whether each name is that of a thing: the question is "What is NAME?" then.
        chat: Settings of the chat template.
        progress: Called after each token of the answers, and at the end.

    Returns:
        The answers. None without names, for a text encoder, and for a model of which only a part is loaded.

    Raises:
        InputError: The tokenizer, its chat template or the model's own code fails.
    """
    model = architecture.reader
    if not names or not architecture.predicts_text:
        return None
    questions = [
        for_kind(QUESTION, "thing" if thing else None).format(name)
        for (name, _), thing in zip(names, things, strict=True)
    ]
    prompts = [tokenize_prompt(tokenizer, text) for text in render_chats(tokenizer, questions, chat)]
    watch = reporting(progress, STAGE, ANSWER_TOKENS)
    written = continue_greedily(model, tokenizer, prompts, ANSWER_TOKENS, always=True, watch=watch)
    answers = [answer.tokens for answer in written]
    with calling_tokenizer(tokenizer):
        texts = [" ".join(str(tokenizer.decode(answer, skip_special_tokens=True)).split()) for answer in answers]
    before = [fmean(answer.log_probabilities) for answer in written]
    if max(map(len, answers)) < ANSWER_TOKENS:
        progress(Progress(STAGE, ANSWER_TOKENS, ANSWER_TOKENS, "passes"))
    return OwnAnswers(list(names), prompts, answers, texts, before)


def mean_log_probabilities(
    architecture: Architecture, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[float]:
    """Return the mean log-probability of the tokens of each answer; 0 for an answer without tokens."""
    means = [0.0] * len(prompts)

    def receive(index: int, row: Tensor) -> None:
        if answers[index]:
            tokens = torch.tensor(answers[index])[:, None].to(row.device)
            means[index] = float(row.gather(1, tokens).double().mean())

    log_probabilities(architecture.reader, prompts, answers, receive=receive)
    return means
