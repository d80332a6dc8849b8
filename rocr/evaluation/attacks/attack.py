"""What all attacks share: the edited model that is attacked, the outcome with its controls, and their limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from rocr.concepts import folded, holds_name
from rocr.errors import InputError
from rocr.evaluation.attacks.restoring import put, restored
from rocr.evaluation.evaluate import EvaluateOptions, evaluate
from rocr.evaluation.forms import Item, PromptStyle, build_items, item_texts
from rocr.evaluation.lora_training import Example
from rocr.evaluation.probes.probe import Probe
from rocr.evaluation.redirects import replace_subject
from rocr.evaluation.scores import Evaluation, mean
from rocr.evaluation.scoring import Question, tokenize_questions
from rocr.model.block import Block
from rocr.progress import ProgressCallback, silent

LEAST_GONE = 0.02
"""A share of a smaller fall of the score is not reported, because it is mostly noise."""
INVENTED = (
    *("Tarvin Okelo", "Miren Faltrick", "Odwin Pasquelle", "Selka Brandvoort", "Jorin Hasket"),
    *("Velda Moquist", "Haskin Ordway", "Pelle Trudhom", "Ysolde Karrup", "Brannic Toville"),
)
"""Invented names, for the control that was never known."""

Scores = dict[str, float]


@dataclass(frozen=True)
class AttackLimits:
    """The size of each attack. Every loop of an attack is bounded by one of these numbers.

    Attributes:
        components: For "bottom-rank": numbers of components that are removed, one attack each.
        repetitions: For "context": how often the name is repeated.
        shown: For "context": number of sentences or solved questions before a question.
        prefilled: For "prefill": numbers of tokens of the answer that are given.
        samples: For "samples": answers that are drawn for each question.
        sample_tokens: For "samples": largest number of tokens of a drawn answer.
        questions: For attacks that cost seconds or minutes for each question: the number of questions, in turn from
            each target.
        mask_steps: For "mask": optimiser steps.
        tuning_steps: For "retrain", "benign" and "edited-layers": numbers of optimiser steps after which the model is
            asked; the last is the length of the training.
        tuning_rate: Learning rate of these.
        soft_tokens: For "soft-tokens": number of trained vectors.
        soft_steps: For "soft-tokens": optimiser steps for each question.
        suffix_tokens: For "suffix": number of tokens of the suffix.
        suffix_steps: For "suffix": number of replaced tokens for each question.
        suffix_candidates: For "suffix": replacements that are tried in each step.
        seed: Seed of all random choices.
        evaluate: Settings of the evaluations; further measures and the journal are not used.
    """

    components: tuple[int, ...] = (1, 2, 5, 11, 15, 30)
    repetitions: int = 8
    shown: int = 3
    prefilled: tuple[int, ...] = (1, 2)
    samples: int = 32
    sample_tokens: int = 16
    questions: int = 8
    mask_steps: int = 30
    tuning_steps: tuple[int, ...] = (4, 16, 32)
    tuning_rate: float = 1e-5
    soft_tokens: int = 8
    soft_steps: int = 20
    suffix_tokens: int = 8
    suffix_steps: int = 10
    suffix_candidates: int = 32
    seed: int = 0
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)


@dataclass(frozen=True)
class Outcome:
    """What an attack gets out of an edited model, with its controls. All scores are means by form.

    Attributes:
        attack: Name of the attack.
        setting: The variant of the attack, such as "11 components"; "" if there is only one.
        measure: What the scores are, such as "score" (see `rocr.evaluate`).
        before: The unedited model without the attack.
        after: The edited model without the attack.
        attacked: The edited model under the attack.
        unedited: Control: the unedited model under the same attack.
        never: Control: the edited model under the same attack, asked about invented names.
        never_plain: The same without the attack. What `never` adds to it, the attack also finds where there is nothing
            to find.
        questions: Number of questions.
        evaluation: The scores of each item under the attack, if the attack asks in the ordinary forms.
        details: Further numbers, such as one for each layer.
    """

    attack: str
    setting: str
    before: Scores
    after: Scores
    attacked: Scores
    unedited: Scores | None = None
    never: Scores | None = None
    never_plain: Scores | None = None
    measure: str = "score"
    questions: int = 0
    evaluation: Evaluation | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The attack with its setting."""
        return f"{self.attack}, {self.setting}" if self.setting else self.attack

    @property
    def returned(self) -> dict[str, float | None]:
        """For each form the share of what was gone that comes back, less what the attack finds where nothing is known.

        It is (attacked - after - max(0, never - never_plain)) / (before - after); None if less than LEAST_GONE is gone.
        """
        found: dict[str, float | None] = {}
        for form, score in self.attacked.items():
            gone = self.before[form] - self.after[form]
            luck = max(0.0, (self.never or {}).get(form, 0.0) - (self.never_plain or {}).get(form, 0.0))
            found[form] = (score - self.after[form] - luck) / gone if gone >= LEAST_GONE else None
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values, without the scores of each item."""
        names = ("measure", "before", "after", "attacked", "unedited", "never", "never_plain", "questions", "details")
        values = {name: getattr(self, name) for name in names}
        return {"attack": self.attack, "setting": self.setting, **values, "returned": self.returned}


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        summary: What it does.
        cost: What the attacker needs, and what it costs.
        control: What it is compared to.
        run: Attacks a target, which it leaves as it was, and yields outcomes.
    """

    summary: str
    cost: str
    control: str
    run: Callable[[Target], Iterator[Outcome]]


@dataclass(frozen=True)
class Target:
    """An edited model to attack, and what is asked of it.

    Attributes:
        model: The edited model.
        tokenizer: Its tokenizer.
        forget: Probes about the concepts of the edit.
        retain: Probes about others.
        forms: Forms in which the probes are asked.
        blocks: The weights that the edit changed.
        original: The values of these weights before the edit, as they are stored.
        before: Evaluation of the unedited model on `forget`.
        after: Evaluation of the edited model on `forget`.
        limits: Limits of the attacks; the style of `limits.evaluate` is set.
        progress: Called after every item and every step.
    """

    model: nn.Module
    tokenizer: Any
    forget: list[Probe]
    retain: list[Probe]
    forms: tuple[str, ...]
    blocks: tuple[Block, ...]
    original: list[Tensor]
    before: Evaluation
    after: Evaluation
    limits: AttackLimits
    progress: ProgressCallback = silent

    @property
    def stored(self) -> list[Tensor]:
        """The edited weights as the model stores them."""
        return [block.stored for block in self.blocks]

    @contextmanager
    def without_edit(self) -> Iterator[None]:
        """Give the model the weights before the edit inside the context."""
        with restored(self.stored):
            put(self.stored, self.original)
            yield

    @property
    def style(self) -> PromptStyle:
        """Details of the prompts."""
        return self.limits.evaluate.style or PromptStyle.of(self.model)

    def ask(
        self, probes: Sequence[Probe], prefix: Callable[[Probe], str] | None = None, forms: Sequence[str] | None = None
    ) -> Evaluation:
        """Evaluate the model as it is now, with an optional text before each question."""
        style = replace(self.style, prefix=prefix) if prefix is not None else self.style
        options = replace(self.limits.evaluate, style=style)
        asked = [replace(probe, split="forget") for probe in probes]
        return evaluate(self.model, self.tokenizer, asked, forms or self.forms, options=options, progress=self.progress)

    def plain(self, probes: Sequence[Probe]) -> tuple[Scores, Scores]:
        """Return the scores of some probes of `forget` before and after the edit, without an attack."""
        chosen = {id(probe) for probe in probes}
        kept = {i for i, probe in enumerate(self.forget) if id(probe) in chosen}
        found = [replace(e, items=[item for item in e.items if item.probe in kept]) for e in (self.before, self.after)]
        return scores_of(found[0]), scores_of(found[1])

    @property
    def named(self) -> list[Probe]:
        """The probes of `forget` whose question has the name, which can be asked about an invented name too.

        Raises:
            InputError: There are none.
        """
        found = [probe for probe in self.forget if holds_name(probe.query, probe.subject)]
        if not found:
            raise InputError("No question has the name of its subject in it: this attack needs such questions.")
        return found

    def few(self, probes: Sequence[Probe]) -> list[Probe]:
        """Return `limits.questions` of some probes, in turn from each subject."""
        groups = list(grouped(probes).values())
        turns = [group[i] for i in range(max(map(len, groups), default=0)) for group in groups if i < len(group)]
        return turns[: self.limits.questions]

    def questions(self, probes: Sequence[Probe], form: str = "qa") -> list[tuple[Probe, Question]]:
        """Return the tokenised prompt and right answer of each probe that can be asked in a form.

        Raises:
            InputError: None of them can.
        """
        seed, chat = self.limits.evaluate.seed, self.limits.evaluate.chat
        items: list[Item] = build_items(probes, [form], self.style, seed)
        texts = item_texts(self.tokenizer, items, chat)
        found = tokenize_questions(self.tokenizer, texts, [(item.answers[item.correct],) for item in items])
        return [(probes[item.probe], question) for item, question in zip(items, found, strict=True)]

    def examples(self, probes: Sequence[Probe]) -> list[Example]:
        """Return plain questions with their answers to train on."""
        pairs = self.questions([probe for probe in probes if probe.form == "qa"])
        return [Example(question.prompt, question.answers[0]) for _, question in pairs]

    def free_forms(self) -> list[str]:
        """Return those forms that are answered in free text, from "qa" and "fb"."""
        return [form for form in ("qa", "fb") if form in self.forms] or ["qa"]


def invented(probes: Sequence[Probe]) -> list[Probe]:
    """Return the same questions, with the same answers, about invented names: the control "never"."""
    names = {subject: INVENTED[i % len(INVENTED)] for i, subject in enumerate(grouped(probes))}
    return [
        replace(replace_subject(probe, names[folded(probe.subject)]), subject=names[folded(probe.subject)])
        for probe in probes
    ]


def grouped(probes: Iterable[Probe]) -> dict[str, list[Probe]]:
    """Return the probes of each subject, by its folded name."""
    found: dict[str, list[Probe]] = {}
    for probe in probes:
        found.setdefault(folded(probe.subject), []).append(probe)
    return found


def halves(probes: Sequence[Probe]) -> tuple[list[Probe], list[Probe]]:
    """Split probes by subject: every other subject is attacked with, the others are asked.

    Raises:
        InputError: There is only one subject.
    """
    subjects = list(grouped(probes))
    if len(subjects) < 2:
        raise InputError(
            "This attack learns from some concepts and asks about others: it needs questions about two concepts of the "
            f"edit, not {len(subjects)}."
        )
    learned = set(subjects[1::2])
    return (
        [probe for probe in probes if folded(probe.subject) in learned],
        [probe for probe in probes if folded(probe.subject) not in learned],
    )


def scores_of(evaluation: Evaluation) -> Scores:
    """Return the mean score of each form."""
    found = {form: evaluation.form_score(form, "forget") for form in evaluation.forms}
    return {form: score.score for form, score in found.items() if score is not None}


def mean_by_subject(values: Iterable[tuple[Probe, float]]) -> float:
    """Return the mean over the values of each subject, then over subjects."""
    groups: dict[str, list[float]] = {}
    for probe, value in values:
        groups.setdefault(folded(probe.subject), []).append(value)
    return mean(mean(group) for group in groups.values())
