"""Scores of an evaluation, and the comparison of two: before and after an edit.

The score of a form is the mean over the items of each target, then over targets, for each split, as in ORT (Ye, Zhang
and Wu, arXiv 2506.07795).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rocr.errors import InputError, RocrError

CHOICE_FORMS = ("mcp", "reverse-mcp")
"""The forms whose answer is one of several options."""


@dataclass(frozen=True)
class ItemScore:
    """The scores of one item: a probe that is asked in one form.

    Attributes:
        probe: Index of the probe.
        subject: Subject of the probe.
        form: Form of the question.
        split: "forget" or "retain".
        score: exp(-mean negative log-likelihood of the right answer's tokens), from 0 to 1.
        accuracy: Share of the right answer's tokens with the highest logit, each token given the true ones before it.
        extraction: Extraction strength of the right answer (Carlini et al., arXiv 2012.07805), from 0 to 1.
        choice: Probability of the right option relative to all options; None if there are no options.
        derived: Whether the question was derived from a probe of another form.
        chance: Score of a uniform guess; None if there are no options.
        question: The message that was asked, without a chat template.
        answer: The right answer, or the letter of the right option.
    """

    probe: int
    subject: str
    form: str
    split: str
    score: float
    accuracy: float
    extraction: float
    choice: float | None = None
    derived: bool = False
    chance: float | None = None
    question: str = ""
    answer: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the scores as JSON values; the texts, which are the same before and after an edit, are left out."""
        return {name: value for name, value in asdict(self).items() if name not in ("question", "answer")}


@dataclass(frozen=True)
class FreeAnswer:
    """What a model answers to a probe in free text.

    Attributes:
        probe: Index of the probe.
        subject: Subject of the probe.
        split: "forget" or "retain".
        question: The question.
        answer: The right answer.
        text: What the model wrote.
        contained: Whether the text contains the right answer.
    """

    probe: int
    subject: str
    split: str
    question: str
    answer: str
    text: str
    contained: bool


@dataclass(frozen=True)
class FormScore:
    """The mean scores of one form and split, over the items of each target, then over targets.

    Attributes:
        score: Mean of `ItemScore.score`.
        accuracy: Mean of `ItemScore.accuracy`.
        extraction: Mean of `ItemScore.extraction`.
        choice: Mean of `ItemScore.choice`; None if no item has options.
        chance: Mean of `ItemScore.chance`; None if no item has options.
        items: Number of items.
        derived: Number of items whose question was derived from a probe of another form.
        targets: Number of targets.
    """

    score: float
    accuracy: float
    extraction: float
    choice: float | None
    chance: float | None
    items: int
    derived: int
    targets: int


@dataclass
class Evaluation:
    """The scores of a model.

    Attributes:
        items: Scores of every item.
        probes: Number of probes that were asked.
        known: Number of probes that the base model knows; only these count. None if all probes count.
        known_threshold: Score from which a probe counts as known.
        measures: Further measures by name, such as "perplexity".
        settings: Forms, seed and other settings of the evaluation.
        seconds: Duration of the evaluation.
        answers: The model's answers in free text, if it was let write them.
    """

    items: list[ItemScore]
    probes: int
    known: int | None = None
    known_threshold: float | None = None
    measures: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    answers: list[FreeAnswer] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return one line, such as "Evaluation(300 probes, 1,180 items, forms=('qa', 'fb'))"."""
        return f"Evaluation({self.probes:,} probes, {len(self.items):,} items, forms={self.forms})"

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that were asked, in the order of the items."""
        return tuple(dict.fromkeys(item.form for item in self.items))

    def select(self, form: str, split: str) -> list[ItemScore]:
        """Return the items of one form and split."""
        return [item for item in self.items if item.form == form and item.split == split]

    def form_score(self, form: str, split: str) -> FormScore | None:
        """Return the mean scores of one form and split; None if it has no items.

        Raises:
            RocrError: If a score is not a finite number.
        """
        items = self.select(form, split)
        if not items:
            return None
        return FormScore(
            score=mean_over_targets(items, lambda item: item.score),
            accuracy=mean_over_targets(items, lambda item: item.accuracy),
            extraction=mean_over_targets(items, lambda item: item.extraction),
            choice=_optional_mean(items, lambda item: item.choice),
            chance=_optional_mean(items, lambda item: item.chance),
            items=len(items),
            derived=sum(item.derived for item in items),
            targets=len({item.subject for item in items}),
        )

    def by_target(self, split: str = "forget") -> dict[str, dict[str, float]]:
        """Return the mean score of each form of each target, as `{target: {form: score}}`."""
        result: dict[str, dict[str, float]] = {}
        for form in self.forms:
            for subject, items in by_subject(self.select(form, split)).items():
                result.setdefault(subject, {})[form] = mean(item.score for item in items)
        return result

    def worst(self, split: str = "forget") -> dict[str, tuple[str, float]]:
        """Return the form with the highest score, and this score, for each target.

        Multiple choice (CHOICE_FORMS) is left out: a guess among four options scores 1/4, so its scores cannot be
        compared with those of answers in words.
        """
        result = {}
        for subject, scores in self.by_target(split).items():
            comparable = {form: score for form, score in scores.items() if form not in CHOICE_FORMS}
            if comparable:
                result[subject] = max(comparable.items(), key=lambda pair: pair[1])
        return result

    def worst_score(self, split: str = "forget") -> float | None:
        """Return the mean over targets of the scores of `worst`; None if there are none."""
        found = [score for _, score in self.worst(split).values()]
        return mean(found) if found else None

    def worst_case(self, split: str = "forget") -> float | None:
        """Return how much is left of each fact in the form or wording that reveals most of it; None without items.

        For each probe the highest (score - chance)/(1 - chance) of its forms, at least 0, where the orders of a
        multiple-choice question count as one form; the mean over the probes of each target, then over targets.
        """
        left: dict[tuple[str, int], dict[str, list[float]]] = {}
        for item in self.items:
            if item.split == split:
                chance = item.chance or 0.0
                share = (item.score - chance) / (1 - chance)
                left.setdefault((item.subject, item.probe), {}).setdefault(item.form, []).append(share)
        targets: dict[str, list[float]] = {}
        for (subject, _), forms in left.items():
            targets.setdefault(subject, []).append(max(0.0, *(mean(shares) for shares in forms.values())))
        return mean(map(mean, targets.values())) if targets else None

    def known_probes(self, threshold: float) -> set[int]:
        """Return the indices of the probes that the model knows: those with a score of at least `threshold`.

        The score is that of multiple choice (mean over the orders of the options) if the probe was asked in this form,
        or else the highest score of its forms.
        """
        known = set()
        probes: dict[int, list[ItemScore]] = {}
        for item in self.items:
            probes.setdefault(item.probe, []).append(item)
        for probe, items in probes.items():
            choices = [item.score for item in items if item.form in CHOICE_FORMS]
            if (mean(choices) if choices else max(item.score for item in items)) >= threshold:
                known.add(probe)
        return known

    def restricted(self, probes: set[int], threshold: float) -> Evaluation:
        """Return the scores of some probes only.

        Args:
            probes: Indices of the probes to keep.
            threshold: Score from which a probe counts as known, for `known_threshold`.

        Raises:
            InputError: If no item of the forget set is left, or of the retain set if there is no forget set.
        """
        items = [item for item in self.items if item.probe in probes]
        split = "forget" if any(item.split == "forget" for item in self.items) else "retain"
        if not any(item.split == split for item in items):
            raise InputError(
                f"The model knows none of the {self.probes} probes to {split} (scores of at least {threshold:g}); "
                "lower --known, or give probes about better-known subjects."
            )
        answers = [answer for answer in self.answers if answer.probe in probes]
        measures, settings = dict(self.measures), dict(self.settings)
        return Evaluation(items, self.probes, len(probes), threshold, measures, settings, self.seconds, answers)

    def to_json(self) -> dict[str, Any]:
        """Return the scores and their means as JSON values."""
        splits = [split for split in ("forget", "retain") if any(item.split == split for item in self.items)]
        means = {split: {form: self.form_score(form, split) for form in self.forms} for split in splits}
        return {
            "forms": {
                split: {form: asdict(score) for form, score in scores.items() if score is not None}
                for split, scores in means.items()
            },
            "worst": {s: {"form": form, "score": score} for s, (form, score) in self.worst().items()},
            "worst_score": self.worst_score(),
            "worst_case": self.worst_case(),
            "measures": self.measures,
            "probes": self.probes,
            "known": self.known,
            "known_threshold": self.known_threshold,
            "settings": self.settings,
            "seconds": self.seconds,
            "items": [item.to_json() for item in self.items],
            "answers": [asdict(answer) for answer in self.answers],
        }


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean of one or more values.

    Raises:
        RocrError: If a value is not a finite number.
    """
    found = list(values)
    if not all(map(math.isfinite, found)):
        raise RocrError(f"{sum(not math.isfinite(v) for v in found)} of {len(found)} scores are not finite numbers.")
    return math.fsum(found) / len(found)


def by_subject(items: Iterable[ItemScore]) -> dict[str, list[ItemScore]]:
    """Return the items of each subject."""
    result: dict[str, list[ItemScore]] = {}
    for item in items:
        result.setdefault(item.subject, []).append(item)
    return result


def mean_over_targets(items: Iterable[ItemScore], value: Callable[[ItemScore], float]) -> float:
    """Return the mean of a value over the items of each target, then over targets."""
    return mean(mean(map(value, group)) for group in by_subject(items).values())


def _optional_mean(items: list[ItemScore], value: Callable[[ItemScore], float | None]) -> float | None:
    present = [item for item in items if value(item) is not None]
    return mean_over_targets(present, lambda item: value(item) or 0.0) if present else None


@dataclass(frozen=True)
class FormChange:
    """The change of the score of one form and split.

    Attributes:
        form: Form of the questions.
        split: "forget" or "retain".
        before: Score before the edit.
        after: Score after the edit.
        chance: Score of a uniform guess; None if there are no options.
        fall: Relative decrease (before - after) / (before - chance), with a chance of 0 if there are no options; 0 if
            the score before does not exceed chance.
        items: Number of items.
        targets: Number of targets.
        derived: Number of items whose question was derived from a probe of another form.
    """

    form: str
    split: str
    before: float
    after: float
    chance: float | None
    fall: float
    items: int
    targets: int
    derived: int


@dataclass(frozen=True)
class Comparison:
    """The comparison of two evaluations of the same items.

    Attributes:
        changes: The change of each split and form.
        worst: For each target the form with the highest score after the edit, and this score; see `Evaluation.worst`.
        measures: The values before and after of each further measure.
    """

    changes: list[FormChange]
    worst: dict[str, tuple[str, float]]
    measures: dict[str, tuple[Any, Any]]

    def change(self, form: str, split: str) -> FormChange | None:
        """Return the change of one form and split; None if it was not asked."""
        return next((c for c in self.changes if (c.form, c.split) == (form, split)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "changes": [asdict(change) for change in self.changes],
            "worst": {s: {"form": form, "score": score} for s, (form, score) in self.worst.items()},
            "measures": {name: {"before": pair[0], "after": pair[1]} for name, pair in self.measures.items()},
        }


def compare_evaluations(before: Evaluation, after: Evaluation) -> Comparison:
    """Compare two evaluations of the same items.

    Args:
        before: Evaluation of the model before the edit.
        after: Evaluation of the edited model.

    Raises:
        InputError: If the items of the two evaluations differ.
    """
    if [(i.probe, i.form, i.split) for i in before.items] != [(i.probe, i.form, i.split) for i in after.items]:
        raise InputError(
            f"The evaluations are of different items ({len(before.items)} and {len(after.items)}): "
            "use the same probes, forms, seed and known probes for both."
        )
    changes = []
    for split in ("forget", "retain"):
        for form in before.forms:
            old, new = before.form_score(form, split), after.form_score(form, split)
            if old is not None and new is not None:
                fall = relative_fall(old.score, new.score, old.chance or 0.0)
                counts = (old.items, old.targets, old.derived)
                changes.append(FormChange(form, split, old.score, new.score, old.chance, fall, *counts))
    measures = {name: (value, after.measures.get(name)) for name, value in before.measures.items()}
    return Comparison(changes, after.worst(), measures)


def relative_fall(before: float, after: float, chance: float = 0.0) -> float:
    """Return the relative decrease (before - after) / (before - chance); 0 unless `before` exceeds chance."""
    return (before - after) / (before - chance) if before > chance else 0.0
