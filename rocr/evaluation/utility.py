"""Multiple-choice questions about anything: what a model can still do after an edit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rocr.config import DEFAULT, ChatSettings
from rocr.errors import InputError
from rocr.evaluation.forms import Item, item_texts
from rocr.evaluation.probes.probe import LETTERS, Problems
from rocr.evaluation.scoring import AnswerScore, score_answers, tokenize_questions
from rocr.io.bounded import read_bounded
from rocr.io.json_values import parse_json

MAX_FILE_BYTES = 256 * 2**20
_PROMPT = "Please answer the following multiple choice question. Just provide the letter of the correct answer.\n"


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with choices, of which the one at index `correct` is right."""

    question: str
    choices: tuple[str, ...]
    correct: int


def load_choice_questions(path: str | os.PathLike[str]) -> list[ChoiceQuestion]:
    """Read a JSONL file with `question`, `choices` (a list) and `gold_idx` (from 0) a line.

    Raises:
        InputError: it cannot be read, or lines are wrong; names every line, up to 50.
    """
    problems, questions = Problems(), []
    try:
        lines = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start:,}.") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                questions.append(_question(parse_json(line)))
            except (ValueError, TypeError, KeyError) as error:
                problems.add(f"{path}:{number}", f"is not a question with choices and gold_idx: {str(error)[:200]}")
    problems.raise_any()
    if not questions:
        raise InputError(f"{path} holds no questions.")
    return questions


def choice_accuracy(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[ChoiceQuestion],
    token_budget: int,
    chat: ChatSettings = DEFAULT,
) -> dict[str, float]:
    """Share of questions whose right letter the model prefers to the other letters, with the chance level."""
    items = [
        Item(
            probe=i,
            form="utility",
            message=f"{_PROMPT}Question: {question.question}"
            + "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
            + "\n",
            answers=tuple(f" {letter}" for letter in LETTERS[: len(question.choices)]),
            correct=question.correct,
        )
        for i, question in enumerate(questions)
    ]
    right: dict[int, bool] = {}

    def receive(index: int, scores: list[AnswerScore]) -> None:
        best = min(range(len(scores)), key=lambda i: scores[i].nll)
        right[index] = best == items[index].correct

    tokenized = tokenize_questions(tokenizer, item_texts(tokenizer, items, chat), [item.answers for item in items])
    score_answers(model, tokenized, receive, token_budget)
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    return {"accuracy": sum(right.values()) / len(right), "chance": chance, "questions": len(right)}


def _question(value: Any) -> ChoiceQuestion:
    question, choices, correct = value["question"], value["choices"], value["gold_idx"]
    if (
        not isinstance(question, str)
        or not isinstance(choices, list)
        or not all(isinstance(choice, str) for choice in choices)
    ):
        raise ValueError("question and choices must be texts")
    "".join([question, *choices]).encode()  # half of a surrogate pair is a ValueError
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{len(choices)} choices; from 2 to {len(LETTERS)} are wanted")
    if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < len(choices):
        raise ValueError(f"gold_idx is {correct!r}, with {len(choices)} choices")
    return ChoiceQuestion(question, tuple(choices), correct)
