"""The common interface of the compared methods: what a method is given, and the unlearned model that it gives back."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rocr.chat_settings import ChatSettings
from rocr.config import EditConfig
from rocr.errors import InputError
from rocr.evaluation.forms import ORT_FORMS, PromptStyle, no_prefix
from rocr.evaluation.lora_training import Example, question_examples
from rocr.evaluation.probes.probe import Probe
from rocr.progress import ProgressCallback, silent
from rocr.statistics.statistics import Statistics

MAX_RETAIN = 64
"""Largest number of questions about others that a method trains on; it bounds the memory of what is kept of them."""


@dataclass(frozen=True)
class MethodComparison:
    """The inputs that all compared methods share.

    Attributes:
        model: Causal language model of transformers; it is unchanged after each method.
        tokenizer: Its tokenizer.
        probes: Probes about the targets and about other subjects, which form the retain set.
        statistics: Statistics of the layers of `layers_to_edit`, for "rocr", "official ROCR" and "UniErase".
        redirect: Redirect of the targets for "rocr".
        official_redirect: Redirect of the targets for "official ROCR".
        config: Settings of "rocr"; None uses the defaults.
        forms: Forms in which the probes are asked.
        least_steps: Minimum number of optimiser steps of trained methods. The authors train on hundreds of texts about
            a target; with a few questions, their epochs have too few steps.
        steps: Number of optimiser steps of trained methods, in place of `least_steps` and of their own numbers. None:
            the number of each method.
        seed: Seed of the order of multiple-choice options; trained methods add it to their own seed.
        retain: Probes about other subjects that methods may train on, to keep what the model knows about them. Empty:
            the retain set itself, which such methods are then tested on as well.
        sequential: Whether each target is unlearned in the model that the targets before it left.
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
    retain: Sequence[Probe] = ()
    sequential: bool = False

    @property
    def chat(self) -> ChatSettings:
        """Settings of the chat template for editing, training and asking."""
        return (self.config or EditConfig()).chat


@dataclass(frozen=True)
class Case:
    """One target to unlearn.

    Attributes:
        comparison: The inputs that all methods share.
        model: The model to unlearn it from: that of the comparison, or in a sequence the one that the method left.
        target: Name of the subject. Methods that read nothing but the probes also take several subjects at once.
        probes: All probes, of the split "forget" if they are about the target.
        progress: Called during training and editing.
        earlier: In a sequence, the `Unlearned.state` of the target before; None for the first.
    """

    comparison: MethodComparison
    model: nn.Module
    target: str
    probes: Sequence[Probe]
    progress: ProgressCallback = silent
    earlier: Any = None

    @property
    def seed(self) -> int:
        """The seed of the comparison."""
        return self.comparison.seed

    def forget(self, preferred: Callable[[Probe], str] | None = None) -> list[Example]:
        """Return the questions about the target with their right answers; those of the form "qa" are trained on.

        Args:
            preferred: Function that gives the answer which takes the place of the right one; None for none.

        Raises:
            InputError: There are none.
        """
        return self._examples([probe for probe in self.probes if probe.split == "forget"], preferred)

    def retain(self) -> list[Example]:
        """Return questions about others with their right answers: at most `MAX_RETAIN`, drawn by the seed.

        Raises:
            InputError: There are none.
        """
        given = self.comparison.retain or [probe for probe in self.probes if probe.split == "retain"]
        questions = [probe for probe in given if probe.form == "qa"]
        check_others(questions, "Methods that train on questions about others")
        random.Random(self.seed).shuffle(questions)
        return self._examples(questions[:MAX_RETAIN], None)

    def _examples(self, probes: Sequence[Probe], preferred: Callable[[Probe], str] | None) -> list[Example]:
        comparison = self.comparison
        if not any(probe.form == "qa" for probe in probes):
            raise InputError(
                f"No probe of the form qa is about {self.target!r}, and methods that train need such questions; give "
                "some, or leave these methods out."
            )
        style = PromptStyle.of(comparison.model)
        return question_examples(comparison.tokenizer, probes, preferred, style, comparison.chat)


def check_others(probes: Sequence[Probe], what: str) -> None:
    """Raise InputError unless one of some probes about others is of the form "qa"; `what` needs it."""
    if not any(probe.form == "qa" for probe in probes):
        raise InputError(
            f"{what} need probes of the form qa about subjects besides the target, and there are none: give some, or "
            "leave these out."
        )


@dataclass(frozen=True)
class Unlearned:
    """A model in which a method has unlearned a target.

    Attributes:
        model: The model to ask.
        state: What the method needs for the next target of a sequence.
        extra_tokens: Number of tokens that the method adds to the vocabulary of the model.
    """

    model: nn.Module
    state: Any = None
    extra_tokens: int = 0


Unlearning = Callable[[Case], AbstractContextManager[Unlearned]]


def _any_model(_model: nn.Module) -> None:
    """Check nothing."""


def _no_prefix(_case: Case) -> Callable[[Probe], str]:
    return no_prefix


@dataclass(frozen=True)
class Method:
    """An unlearning method.

    Attributes:
        name: Its name in tables.
        unlearned: Unlearns a case; leaving the context restores the model bit for bit, also after an exception.
        packages: Modules of optional packages that it needs, by rocr's extra that installs them.
        trains_on_others: Whether it trains on questions about others too, of the form "qa".
        sequential: Whether it is defined for targets one after another: `unlearned` may be entered again inside its own
            context, with the state of the outer one as `Case.earlier`.
        extra_layers: Gives the layers that it edits and needs statistics of, by the depth of the model.
        check: Raises InputError for a model that the method cannot change.
        prefix: Gives the text before each question about a case, for a method that leaves the model as it is.
    """

    name: str
    unlearned: Unlearning
    packages: tuple[tuple[str, str], ...] = ()
    trains_on_others: bool = False
    sequential: bool = False
    extra_layers: Callable[[int], Sequence[int]] | None = None
    check: Callable[[nn.Module], object] = _any_model
    prefix: Callable[[Case], Callable[[Probe], str]] = _no_prefix

    def style(self, case: Case) -> PromptStyle:
        """Return the style of the questions that the unlearned model is asked."""
        return replace(PromptStyle.of(case.comparison.model), prefix=self.prefix(case))
