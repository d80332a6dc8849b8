"""Evaluate a model: ask every probe in every form, score the answers, and measure what else is wanted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from rocr.concepts import folded
from rocr.config import DEFAULT, ChatSettings
from rocr.errors import InputError
from rocr.evaluation.forms import ORT_FORMS, Item, PromptStyle, build_items, item_texts
from rocr.evaluation.generation import contained_answers
from rocr.evaluation.journal import Journal
from rocr.evaluation.probes.probe import Probe, check_probes, split_by_subject
from rocr.evaluation.scores import Evaluation, ItemScore
from rocr.evaluation.scoring import TOKEN_BUDGET, AnswerScore, score_answers, tokenize_questions
from rocr.evaluation.text_measures import TextSample, perplexity
from rocr.evaluation.utility import ChoiceQuestion, choice_accuracy
from rocr.model.chat import with_date
from rocr.model.fingerprint import tensor_digest, tokenizer_digest
from rocr.ops.arithmetic import plain_arithmetic
from rocr.progress import Progress, ProgressCallback, silent


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured beside the forms, and how.

    Attributes:
        seed: of the order of multiple-choice options and of misspellings.
        orders: in how many orders the options of a multiple-choice question are asked.
        token_budget: tokens that run together, padding included.
        generate: whether questions are also answered in free text: containment of the answer, n-gram entropy.
        text: ordinary text, for the perplexity.
        utility: multiple-choice questions about anything, for the accuracy.
        journal: a file of the scores so far, from which an interrupted evaluation goes on.
        style: prompt details; None: the authors', by the model's name.
        chat: what chat templates are given.
    """

    seed: int = 0
    orders: int = 1
    token_budget: int = TOKEN_BUDGET
    generate: bool = False
    text: TextSample | None = None
    utility: Sequence[ChoiceQuestion] = ()
    journal: str | os.PathLike[str] | None = None
    style: PromptStyle | None = None
    chat: ChatSettings = DEFAULT


@plain_arithmetic()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    forms: Sequence[str] = ORT_FORMS,
    *,
    targets: Sequence[str] | None = None,
    known: float | None = None,
    base: Evaluation | None = None,
    options: EvaluateOptions | None = None,
    progress: ProgressCallback = silent,
) -> Evaluation:
    """Score a model's answers in every form, as ORT does (Ye, Zhang and Wu, arXiv 2506.07795, section V).

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        probes: what to ask; see `load_probes`.
        forms: of `FORMS`.
        targets: subjects to forget, all others being to be kept; None: as the probes say.
        known: keep only probes that the base model knows, with a score of at least this, 0 to 1.
        base: an evaluation of the base model by the same probes and settings, which `known` looks at;
            None: this model is the base.
        options: what else is measured, and how.
        progress: told after every item.

    Raises:
        InputError: bad probes, forms or settings; or nothing is left of the forget set.
        RocrError: a score is not a number.
    """
    options = options or EvaluateOptions()
    if known is not None and not 0 <= known <= 1:
        raise InputError(f"known must be between 0 and 1, not {known!r}.")
    check_probes(probes)
    if targets is not None:
        probes = split_by_subject(probes, targets)
    start = time.perf_counter()
    options = replace(options, chat=with_date(options.chat, tokenizer))
    items = build_items(probes, forms, options.style or PromptStyle.of(model), options.seed, options.orders)
    scores = _scores(model, tokenizer, items, options, progress)
    # Spellings of one subject are one subject: it bears the name that it has first.
    subjects: dict[str, str] = {}
    for probe in probes:
        subjects.setdefault(folded(probe.subject), probe.subject)
    found = [_item_score(item, probes[item.probe], scores[i], subjects) for i, item in enumerate(items)]
    settings: dict[str, Any] = {"forms": list(forms), "seed": options.seed, "orders": options.orders}
    if options.chat != DEFAULT:
        settings["chat"] = options.chat.to_json()
    evaluation = Evaluation(found, probes=len(probes), settings=settings)
    if known is not None:
        evaluation = evaluation.restricted((base or evaluation).known_probes(known), known)
    asked = {item.probe for item in evaluation.items}
    evaluation.measures.update(_measures(model, tokenizer, [probes[i] for i in sorted(asked)], options, progress))
    evaluation.seconds = time.perf_counter() - start
    return evaluation


def _scores(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], options: EvaluateOptions, progress: ProgressCallback
) -> dict[int, list[AnswerScore]]:
    """The scores of every item's answers, from the journal or the model."""
    texts = item_texts(tokenizer, items, options.chat)
    questions = tokenize_questions(tokenizer, texts, [item.answers for item in items])
    scores: dict[int, list[AnswerScore]] = {}
    identity = _identity(model, tokenizer, items, options.chat) if options.journal is not None else {}
    with Journal(options.journal, identity) if options.journal is not None else nullcontext() as journal:
        resumed = len(journal.done) if journal is not None else 0
        if journal is not None:
            scores = {i: [AnswerScore(*values) for values in found] for i, found in journal.done.items()}
        left = [i for i in range(len(items)) if i not in scores]

        def receive(index: int, found: list[AnswerScore]) -> None:
            scores[left[index]] = found
            if journal is not None:
                journal.add(left[index], [[s.nll, s.accuracy, s.extraction] for s in found])
            progress(Progress("questions", len(scores), len(items), "questions", resumed))

        score_answers(model, [questions[i] for i in left], receive, options.token_budget)
    return scores


def _identity(model: nn.Module, tokenizer: Any, items: Sequence[Item], chat: ChatSettings) -> dict[str, Any]:
    """What a journal is of: every weight, since an edit leaves most of them alone, and every question."""
    weights = hashlib.sha256("".join(tensor_digest(parameter) for parameter in model.parameters()).encode())
    asked = hashlib.sha256(json.dumps([asdict(item) for item in items], sort_keys=True).encode())
    return {
        "model": weights.hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "questions": asked.hexdigest(),
        "chat": chat.to_json(),
    }


def _item_score(item: Item, probe: Probe, answers: list[AnswerScore], subjects: Mapping[str, str]) -> ItemScore:
    right = answers[item.correct]
    probabilities = [math.exp(-answer.nll) for answer in answers]
    total = sum(probabilities)
    return ItemScore(
        probe=item.probe,
        subject=subjects[folded(probe.subject)],
        form=item.form,
        split=probe.split,
        score=probabilities[item.correct],
        accuracy=right.accuracy,
        extraction=right.extraction,
        choice=probabilities[item.correct] / total if len(answers) > 1 and total > 0 else None,
        derived=item.derived,
        chance=item.chance,
    )


def _measures(
    model: nn.Module, tokenizer: Any, probes: Sequence[Probe], options: EvaluateOptions, progress: ProgressCallback
) -> dict[str, Any]:
    measures: dict[str, Any] = {}
    if options.generate:
        measures.update(contained_answers(model, tokenizer, probes, progress, options.chat))
    if options.text is not None:
        measures["perplexity"] = perplexity(model, options.text)
    if options.utility:
        measures["utility"] = choice_accuracy(model, tokenizer, options.utility, options.token_budget, options.chat)
    return measures
