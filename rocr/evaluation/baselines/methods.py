"""Compare rocr with other unlearning methods on the same targets and questions, as Table I of arXiv 2506.07795 does.

As in the paper, trained methods are trained on questions of the form "qa" and evaluated in all forms.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from rocr.chat_settings import ChatSettings
from rocr.concepts import Concept
from rocr.config import EditConfig
from rocr.errors import InputError
from rocr.evaluation.baselines.peak_memory import PeakMemory
from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.forms import ORT_FORMS, PromptStyle
from rocr.evaluation.lora_training import (
    DIRECT_PREFERENCE,
    GRADIENT_ASCENT,
    NEGATIVE_PREFERENCE,
    REJECTION,
    Example,
    question_examples,
    trained,
)
from rocr.evaluation.probes.probe import Probe, split_by_subject
from rocr.evaluation.scores import Evaluation, mean
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
class MethodResult:
    """The result of one method for one target.

    Attributes:
        method: Name of the method, from METHODS.
        target: Subject to forget.
        evaluation: Scores of the target as forget set, and of all other subjects as retain set.
        seconds: Duration of the unlearning, without the evaluation.
        peak_bytes: Peak memory of the unlearning in bytes, the model included; see `PeakMemory`.
    """

    method: str
    target: str
    evaluation: Evaluation
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class MethodComparison:
    """The inputs that all compared methods share.

    Attributes:
        model: Causal language model of transformers; it is unchanged after each method.
        tokenizer: Its tokenizer.
        probes: Probes about the targets and about other subjects, which form the retain set.
        statistics: Statistics of the layers of `layers_to_edit`, for "rocr" and "official ROCR".
        redirect: Redirect of the targets for "rocr".
        official_redirect: Redirect of the targets for "official ROCR".
        config: Settings of "rocr"; None uses the defaults.
        forms: Forms in which the probes are asked.
        least_steps: Minimum number of optimiser steps of trained methods. The authors train on hundreds of texts about
            a target; with a few questions, 5 epochs have too few steps.
        steps: Number of optimiser steps of trained methods, in place of `least_steps`. None: 5 epochs or more.
        seed: Seed of the order of multiple-choice options; trained methods add it to the authors' seed.
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
    steps: int | None = None

    @property
    def chat(self) -> ChatSettings:
        """Settings of the chat template for editing, training and asking."""
        return (self.config or EditConfig()).chat


def compare_methods(
    comparison: MethodComparison,
    targets: Sequence[str],
    methods: Sequence[str] = METHODS,
    progress: ProgressCallback = silent,
) -> Iterator[MethodResult]:
    """Unlearn each target with each method, one at a time, and yield its evaluation.

    Args:
        comparison: Inputs of the methods.
        targets: Subjects to forget, one after the other.
        methods: Names of methods, from METHODS.
        progress: Function that is called as in `evaluate`, `unlearn` and `trained`.

    Raises:
        InputError: If a method is unknown, no probe is about a target, or an input of a method is missing or invalid.
        RocrError: If a score or a loss is not a finite number.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise InputError(
            f"Unknown methods: {', '.join(unknown) or 'none given'}; the methods are {', '.join(METHODS)}."
        )
    for target in targets:
        probes = split_by_subject(comparison.probes, [target])
        for method in methods:
            style = PromptStyle.of(comparison.model)
            if method == "in-context":
                style = replace(style, prefix=partial(_forget_in_context, target))
            memory = PeakMemory(comparison.model)
            start = time.perf_counter()
            with _unlearned(comparison, method, target, probes, progress) as model:
                seconds, peak = time.perf_counter() - start, memory.bytes()
                options = EvaluateOptions(style=style, seed=comparison.seed, chat=comparison.chat)
                evaluation = evaluate(
                    model, comparison.tokenizer, probes, comparison.forms, options=options, progress=progress
                )
            yield MethodResult(method, target, evaluation, seconds, peak)


def layers_to_edit(model: nn.Module, config: EditConfig | None = None) -> list[int]:
    """Return the layers that "rocr" and "official ROCR" edit, and need statistics of."""
    architecture = find_architecture(model)
    layers = [chosen_layers(each, architecture) for each in (config or EditConfig(), EditConfig.official())]
    return sorted({layer for chosen in layers for layer in chosen})


@contextmanager
def _unlearned(
    comparison: MethodComparison, method: str, target: str, probes: Sequence[Probe], progress: ProgressCallback
) -> Iterator[nn.Module]:
    """Yield the model after a method has unlearned the target; leaving the context restores it."""
    if method in TRAININGS:
        training = TRAININGS[method]
        seed = (training.seed + comparison.seed) % 2**63
        training = replace(training, least_steps=comparison.least_steps, steps=comparison.steps, seed=seed)
        examples = _examples(comparison, [p for p in probes if p.split == "forget"], method)
        with trained(comparison.model, examples, training, progress) as model:
            yield model
    elif method in ("rocr", "official ROCR"):
        if method == "rocr":
            config, redirect = comparison.config or EditConfig(), comparison.redirect
        else:
            config, redirect = replace(EditConfig.official(), chat=comparison.chat), comparison.official_redirect
        concept = Concept(target, redirect)
        edit = unlearn(comparison.model, comparison.tokenizer, [concept], comparison.statistics, config, progress)
        try:
            yield comparison.model
        finally:
            edit.revert(comparison.model)
    else:
        yield comparison.model


def _examples(comparison: MethodComparison, probes: Sequence[Probe], method: str) -> list[Example]:
    """Return the examples of a trained method: right answers, refusals, or both."""
    refusal = _refuse if method in ("direct preference", "rejection tuning") else None
    examples = question_examples(
        comparison.tokenizer, probes, refusal, PromptStyle.of(comparison.model), comparison.chat
    )
    if method == "rejection tuning":
        return [Example(example.prompt, example.preferred) for example in examples]
    return examples


def _refuse(_probe: Probe) -> str:
    return REFUSAL


def _forget_in_context(target: str, _probe: Probe) -> str:
    return IN_CONTEXT.format(target)


def forget_table(
    results: Sequence[MethodResult], forms: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and a row for each method: mean scores of the forget set by form, and of each target's worst."""
    rows = []
    for method, mine in _by_method(results).items():
        worst = [score for result in mine if (score := result.evaluation.worst_score()) is not None]
        rows.append((method, *_scores(mine, forms, "forget"), f"{mean(worst):.3f}" if worst else ""))
    return ("method", *forms, "worst form"), rows


def retain_table(
    results: Sequence[MethodResult], forms: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and a row for each method: mean scores of the retain set, mean seconds, highest peak memory."""
    rows = [
        (
            method,
            *_scores(mine, forms, "retain"),
            f"{mean(result.seconds for result in mine):.1f}",
            f"{max(result.peak_bytes for result in mine) / 1e9:.2f}",
        )
        for method, mine in _by_method(results).items()
    ]
    return ("method", *forms, "seconds", "peak GB"), rows


def _by_method(results: Sequence[MethodResult]) -> dict[str, list[MethodResult]]:
    found: dict[str, list[MethodResult]] = {}
    for result in results:
        found.setdefault(result.method, []).append(result)
    return found


def _scores(results: Sequence[MethodResult], forms: Sequence[str], split: str) -> list[str]:
    """Return the mean over targets for each form as text, empty if no question was asked in it."""
    cells = []
    for form in forms:
        scores = [result.evaluation.form_score(form, split) for result in results]
        found = [score.score for score in scores if score is not None]
        cells.append(f"{mean(found):.3f}" if found else "")
    return cells


def results_json(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """Return the results as JSON values."""
    return [
        {
            "method": result.method,
            "target": result.target,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "evaluation": result.evaluation.to_json(),
        }
        for result in results
    ]
