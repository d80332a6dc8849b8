"""The methods that rocr is compared to, on the same targets and questions (the table of arXiv 2506.07795, Table I).

The trained ones see one form of each question (QA), as in the paper, and are asked in all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from rocr.concepts import Concept
from rocr.config import ChatSettings, EditConfig
from rocr.errors import InputError
from rocr.evaluation.attacks.attacks import question_examples
from rocr.evaluation.baselines.peak_memory import PeakMemory
from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.forms import ORT_FORMS, PromptStyle
from rocr.evaluation.lora_training import (
    DIRECT_PREFERENCE,
    GRADIENT_ASCENT,
    NEGATIVE_PREFERENCE,
    REJECTION,
    Example,
    trained,
)
from rocr.evaluation.probes.probe import Probe, split_by_subject
from rocr.evaluation.scores import Evaluation
from rocr.model.architecture import find_architecture
from rocr.model.layers import chosen_layers
from rocr.progress import ProgressCallback, silent
from rocr.statistics.statistics import Statistics
from rocr.unlearn import unlearn

REFUSAL = "I don't know."
IN_CONTEXT = (
    "You are an AI Assistant who is supposed to unlearn about {} and provide answers without its knowledge as if "
    "you never knew about it. Don't tell anyone that you unlearned anything.\n"
)
TRAININGS = {
    "gradient ascent": GRADIENT_ASCENT,
    "negative preference": NEGATIVE_PREFERENCE,
    "rejection tuning": REJECTION,
    "direct preference": DIRECT_PREFERENCE,
}
METHODS = ("original", "in-context", *TRAININGS, "official ROCR", "rocr")


@dataclass(frozen=True)
class Result:
    """What one method did to one target.

    Attributes:
        method: one of METHODS.
        target: the subject to forget.
        evaluation: scores of the forget set, and of the other subjects as retain set.
        seconds: duration of the unlearning, without the evaluation.
        peak_bytes: largest memory while unlearning, the model included; see `PeakMemory`.
    """

    method: str
    target: str
    evaluation: Evaluation
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Contest:
    """What all methods are given.

    Attributes:
        model: the model before; it is left as it was.
        tokenizer: its tokenizer.
        probes: about the targets and, to be kept, about others.
        statistics: of ordinary keys, for the two editing methods.
        redirect: what rocr redirects the targets to.
        official_redirect: what the authors' settings redirect them to.
        config: rocr's settings.
        forms: in which all are asked.
        least_steps: optimiser steps of the trained methods, at least. The authors' corpora hold hundreds of texts
            about a target; the few questions here are repeated until there are as many steps.
        seed: of the order of options; what the trained methods draw is of the authors' seed plus this.
    """

    model: nn.Module
    tokenizer: Any
    probes: Sequence[Probe]
    statistics: Statistics
    redirect: str
    official_redirect: str = "Donald Trump"
    config: EditConfig | None = None
    forms: Sequence[str] = ORT_FORMS
    least_steps: int = 0
    seed: int = 0

    @property
    def chat(self) -> ChatSettings:
        """What chat templates are given, in editing, training and asking: that of the settings."""
        return (self.config or EditConfig()).chat


def compare_methods(
    contest: Contest, targets: Sequence[str], methods: Sequence[str] = METHODS, progress: ProgressCallback = silent
) -> Iterator[Result]:
    """Let each method forget each target, one at a time, and evaluate.

    Raises:
        InputError: an unknown method, or what the methods need is not there.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise InputError(f"Unknown methods: {', '.join(unknown) or 'none'}; they are {', '.join(METHODS)}.")
    for target in targets:
        probes = split_by_subject(contest.probes, [target])
        for method in methods:
            style = PromptStyle.of(contest.model)
            if method == "in-context":
                style = replace(style, prefix=partial(_forget_in_context, target))
            memory = PeakMemory(contest.model)
            start = time.perf_counter()
            with _unlearned(contest, method, target, probes, progress) as model:
                seconds, peak = time.perf_counter() - start, memory.bytes()
                options = EvaluateOptions(style=style, seed=contest.seed, chat=contest.chat)
                evaluation = evaluate(
                    model, contest.tokenizer, probes, contest.forms, options=options, progress=progress
                )
            yield Result(method, target, evaluation, seconds, peak)


def contest_layers(model: nn.Module, config: EditConfig | None = None) -> list[int]:
    """The layers that the two editing methods need statistics of."""
    architecture = find_architecture(model)
    layers = [chosen_layers(each, architecture) for each in (config or EditConfig(), EditConfig.official())]
    return sorted({layer for chosen in layers for layer in chosen})


@contextmanager
def _unlearned(
    contest: Contest, method: str, target: str, probes: Sequence[Probe], progress: ProgressCallback
) -> Iterator[nn.Module]:
    """The model after a method, inside the context."""
    if method in TRAININGS:
        training = TRAININGS[method]
        seed = (training.seed + contest.seed) % 2**63
        training = replace(training, least_steps=contest.least_steps, seed=seed)
        examples = _examples(contest, [p for p in probes if p.split == "forget"], method)
        with trained(contest.model, examples, training, progress) as model:
            yield model
    elif method in ("rocr", "official ROCR"):
        ours = method == "rocr"
        config = (contest.config or EditConfig()) if ours else replace(EditConfig.official(), chat=contest.chat)
        concept = Concept(target, contest.redirect if ours else contest.official_redirect)
        edit = unlearn(contest.model, contest.tokenizer, [concept], contest.statistics, config, progress)
        try:
            yield contest.model
        finally:
            edit.revert(contest.model)
    else:
        yield contest.model


def _examples(contest: Contest, probes: Sequence[Probe], method: str) -> list[Example]:
    """What a trained method is shown: the answers to lower, the refusal to raise, or both."""
    refusal = _refuse if method in ("direct preference", "rejection tuning") else None
    examples = question_examples(contest.tokenizer, probes, refusal, PromptStyle.of(contest.model), contest.chat)
    if method == "rejection tuning":
        return [Example(example.prompt, example.preferred) for example in examples]
    return examples


def _refuse(_probe: Probe) -> str:
    return REFUSAL


def _forget_in_context(target: str, _probe: Probe) -> str:
    return IN_CONTEXT.format(target)
