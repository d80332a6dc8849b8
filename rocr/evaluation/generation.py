"""What a model writes when it is asked: whether the answer is in it, and how varied it is."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from torch import nn

from rocr.concepts import folded
from rocr.config import DEFAULT, ChatSettings
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.scores import mean
from rocr.evaluation.text_measures import ngram_entropy
from rocr.model.generate import ask
from rocr.progress import Progress, ProgressCallback, silent

BATCH = 16
MAX_TOKENS = 48


def contained_answers(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    progress: ProgressCallback = silent,
    chat: ChatSettings = DEFAULT,
) -> dict[str, float]:
    """Greedy answers to plain questions: share that contain the right answer, and entropy of their n-grams.

    Returns:
        "contained forget" and "contained retain" (mean over a target's questions, then over targets) and
        "n-gram entropy" in bits (mean over answers), each where there are such questions.
    """
    asked = sorted((p for p in probes if p.form == "qa"), key=lambda probe: len(probe.query))
    answers: list[str] = []
    for start in range(0, len(asked), BATCH):
        questions = [probe.query for probe in asked[start : start + BATCH]]
        answers += ask(model, tokenizer, questions, MAX_TOKENS, chat)
        progress(Progress("answers", len(answers), len(asked), "answers"))
    result: dict[str, float] = {}
    for split in ("forget", "retain"):
        found: dict[str, list[float]] = {}
        for probe, answer in zip(asked, answers, strict=True):
            if probe.split == split:
                found.setdefault(folded(probe.subject), []).append(float(contains(answer, probe.answer)))
        if found:
            result[f"contained {split}"] = mean(mean(values) for values in found.values())
    if answers:
        result["n-gram entropy"] = mean(ngram_entropy(answer.split()) for answer in answers)
    return result


def contains(text: str, answer: str) -> bool:
    """Whether a text holds an answer as whole words, whatever the case, accents and punctuation."""
    words = _words(answer)
    return bool(words) and f" {words} " in f" {_words(text)} "


def _words(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", folded(text)) if not unicodedata.combining(c))
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())
