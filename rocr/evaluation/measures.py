"""Measures beside the scores of probes: perplexity, KL divergence, multiple-choice accuracy, and generated answers."""

from __future__ import annotations

import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rocr.chat_settings import DEFAULT, ChatSettings
from rocr.concepts import folded
from rocr.errors import InputError, RocrError
from rocr.evaluation.forms import Item, item_texts
from rocr.evaluation.probes.load import read_json_lines
from rocr.evaluation.probes.probe import LETTERS, Probe, Problems
from rocr.evaluation.scores import FreeAnswer, mean
from rocr.evaluation.scoring import AnswerScore, score_answers, tokenize_questions
from rocr.model.forward import forward, logits_of
from rocr.model.generate import ask
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent
from rocr.statistics.corpus import pack_tokens

NGRAM_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
GENERATION_BATCH = 16
MAX_ANSWER_TOKENS = 48
_CHOICE_PROMPT = (
    "Please answer the following multiple choice question. Just provide the letter of the correct answer.\n"
)


@dataclass(frozen=True)
class TextSample:
    """Ordinary text as token sequences of one length.

    Attributes:
        tokens: Token ids (sequences, length), int64.
    """

    tokens: Tensor

    @classmethod
    @plain_arithmetic()
    def take(cls, texts: Iterable[str], tokenizer: Any, tokens: int = 8192, length: int = 512) -> TextSample:
        """Take the first `tokens` tokens of texts, rounded up to whole sequences.

        Args:
            texts: Documents.
            tokenizer: Tokenizer of the model.
            tokens: Number of tokens; fewer are taken if the texts have fewer.
            length: Tokens of a sequence.

        Raises:
            InputError: If the texts have fewer tokens than one sequence.
        """
        wanted = -(-tokens // length)
        full = (s for s in pack_tokens(texts, tokenizer, length) if len(s) == length)
        sequences = list(islice(full, wanted))
        if not sequences:
            raise InputError(f"The text has fewer than {length} tokens, the length of one sequence; give more text.")
        return cls(torch.tensor(sequences))


@plain_arithmetic()
def perplexity(model: nn.Module, sample: TextSample, batch: int = 4) -> float:
    """Return the exponential of the mean negative log-likelihood of all tokens but the first of each sequence.

    Args:
        model: Causal language model of transformers.
        sample: The text.
        batch: Sequences that run together.

    Raises:
        RocrError: If the perplexity is not a finite number.
    """
    total, count = 0.0, 0
    for tokens in torch.split(sample.tokens, batch):
        logits = logits_of(forward(model, tokens, use_cache=False))[:, :-1].float()
        tokens = tokens.to(logits.device)
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
        count += tokens[:, 1:].numel()
    if not math.isfinite(total):
        raise RocrError("The perplexity is not a finite number, because the model's logits are not finite.")
    return math.exp(total / count)


@plain_arithmetic()
def divergence(
    model: nn.Module, sample: TextSample, before: Callable[[], AbstractContextManager[Any]], batch: int = 4
) -> float:
    """Return the mean KL divergence KL(before ‖ now) of the next-token distributions, in nats per token.

    Args:
        model: The edited model.
        sample: The text.
        before: Function that returns a context in which `model` is as it was before the edit. The context is entered
            once for every batch.
        batch: Sequences that run together.

    Raises:
        RocrError: If the divergence is not a finite number.
    """
    total = sum(_divergences(model, sample, before, batch))
    if not math.isfinite(total):
        raise RocrError("The KL divergence is not a finite number, because the model's logits are not finite.")
    return total / sample.tokens.numel()


def _divergences(
    model: nn.Module, sample: TextSample, before: Callable[[], AbstractContextManager[Any]], batch: int
) -> Iterable[float]:
    """Yield the KL divergence of each batch, summed over its tokens."""
    for tokens in torch.split(sample.tokens, batch):
        now = logits_of(forward(model, tokens, use_cache=False)).float().log_softmax(dim=-1)
        with before():
            then = logits_of(forward(model, tokens, use_cache=False)).float().log_softmax(dim=-1)
        yield float(nn.functional.kl_div(now, then, reduction="sum", log_target=True))


@dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question about any subject.

    Attributes:
        question: The question.
        choices: From 2 to 8 answers.
        correct: Index of the right answer in `choices`.
    """

    question: str
    choices: tuple[str, ...]
    correct: int


def load_choice_questions(path: str | os.PathLike[str]) -> list[ChoiceQuestion]:
    """Read multiple-choice questions from a `.jsonl` file.

    Each line is an object with `question`, `choices` (a list) and `gold_idx` (the index of the right choice, from 0).

    Raises:
        InputError: If the file cannot be read, has no questions, or has invalid lines; the message gives file and line
            of the first 50 of them.
    """
    problems, questions = Problems(), []
    for place, value in read_json_lines(path, problems):
        try:
            questions.append(_choice_question(value))
        except (ValueError, TypeError, KeyError) as error:
            problems.add(place, f"must have question, choices and gold_idx: {str(error)[:200]}")
    problems.raise_any()
    if not questions:
        raise InputError(f"{path} holds no questions; give at least one.")
    return questions


def _choice_question(value: Any) -> ChoiceQuestion:
    """Build a question from a JSON value; raise ValueError, TypeError or KeyError if it is not one."""
    question, choices, correct = value["question"], value["choices"], value["gold_idx"]
    if (
        not isinstance(question, str)
        or not isinstance(choices, list)
        or not all(isinstance(choice, str) for choice in choices)
    ):
        raise ValueError("question must be a string and choices a list of strings")
    "".join([question, *choices]).encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"there must be from 2 to {len(LETTERS)} choices, not {len(choices)}")
    if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < len(choices):
        raise ValueError(f"gold_idx must be from 0 to {len(choices) - 1}, not {correct!r}")
    return ChoiceQuestion(question, tuple(choices), correct)


def choice_accuracy(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[ChoiceQuestion],
    token_budget: int,
    chat: ChatSettings = DEFAULT,
) -> dict[str, float]:
    """Ask multiple-choice questions and compare the probabilities of the letters of the choices.

    Args:
        model: Causal language model of transformers.
        tokenizer: Its tokenizer.
        questions: One or more questions.
        token_budget: Maximum number of tokens in a batch, padding included.
        chat: Settings of the chat template.

    Returns:
        "accuracy" (share of questions whose right letter is the most probable), "chance" (accuracy of a uniform guess)
        and "questions" (their number).
    """
    items = [
        Item(
            probe=i,
            form="utility",
            message=f"{_CHOICE_PROMPT}Question: {question.question}"
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


def free_answers(
    model: nn.Module,
    tokenizer: Any,
    probes: Mapping[int, Probe],
    progress: ProgressCallback = silent,
    chat: ChatSettings = DEFAULT,
) -> list[FreeAnswer]:
    """Generate greedy answers to the probes of the form "qa", and search them for the right answer.

    Args:
        model: Causal language model of transformers.
        tokenizer: Its tokenizer.
        probes: The questions by the index that the answers report.
        progress: Called after every batch.
        chat: Settings of the chat template.

    Returns:
        The answers, in the order of the probes.
    """
    asked = sorted((i for i, probe in probes.items() if probe.form == "qa"), key=lambda i: len(probes[i].query))
    texts: list[str] = []
    for start in range(0, len(asked), GENERATION_BATCH):
        questions = [probes[i].query for i in asked[start : start + GENERATION_BATCH]]
        texts += ask(model, tokenizer, questions, MAX_ANSWER_TOKENS, chat)
        progress(Progress("answers", len(texts), len(asked), "answers"))
    return [
        FreeAnswer(i, probe.subject, probe.split, probe.query, probe.answer, text, contains(text, probe.answer))
        for i, text in sorted(zip(asked, texts, strict=True))
        for probe in [probes[i]]
    ]


def measures_of_answers(answers: Sequence[FreeAnswer]) -> dict[str, float]:
    """Return measures of free answers.

    Returns:
        "contained forget" and "contained retain": share of answers that contain the right one (mean over the questions
        of a target, then over targets). "n-gram entropy": see `ngram_entropy`, in bits (mean over answers). A measure
        without answers is left out.
    """
    result: dict[str, float] = {}
    for split in ("forget", "retain"):
        found: dict[str, list[float]] = {}
        for answer in answers:
            if answer.split == split:
                found.setdefault(folded(answer.subject), []).append(float(answer.contained))
        if found:
            result[f"contained {split}"] = mean(mean(values) for values in found.values())
    if answers:
        result["n-gram entropy"] = mean(ngram_entropy(answer.text.split()) for answer in answers)
    return result


def contains(text: str, answer: str) -> bool:
    """Return whether a text contains an answer as whole words; case, accents and punctuation are ignored."""
    words = _plain_words(answer)
    return bool(words) and f" {words} " in f" {_plain_words(text)} "


def _plain_words(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", folded(text)) if not unicodedata.combining(c))
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())


def ngram_entropy(tokens: Sequence[Any]) -> float:
    """Return the weighted mean of the entropies of 2-grams and 3-grams, in bits; a repetitive text has a low one.

    The weights are those of ROME (Meng et al., arXiv 2202.05262) and of RWKU's fluency: 2/3 and 4/3, divided by 2.
    """
    weighted = 0.0
    for size, weight in NGRAM_WEIGHTS.items():
        counts = Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
        total = sum(counts.values())
        weighted -= weight * sum(c / total * math.log2(c / total) for c in counts.values())
    return weighted / len(NGRAM_WEIGHTS)
