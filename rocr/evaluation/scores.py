"""Scores of forms: mean over a target's items, then over targets, forget and retain apart, as ORT's authors do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rocr.errors import InputError, RocrError

OPEN_FORMS = ("qa", "fb", "subtoken")


@dataclass(frozen=True)
class ItemScore:
    """What a model makes of one item.

    Attributes:
        probe: index of the probe.
        subject: what the probe is about.
        form: how it was asked.
        split: "forget" or "retain".
        score: exp(-mean NLL of the right answer's tokens), 0 to 1.
        accuracy: share of the right answer's tokens that the model prefers.
        extraction: extraction strength of the right answer, 0 to 1.
        choice: probability of the right option among the options; None where there are none.
        derived: whether the question was made from one of another form.
        chance: score of a guess; None where there is nothing to guess among.
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


@dataclass(frozen=True)
class FormScore:
    """The mean scores of one form and split: over each target's items, then over targets."""

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
    """All scores of a model.

    Attributes:
        items: the scores, item by item.
        probes: number of probes that were asked.
        known: number of probes that the model to compare with knows, and that count; None: no filter.
        known_threshold: what score counts as known.
        measures: further numbers, such as perplexity.
        settings: forms, seed and what else was chosen.
        seconds: duration.
    """

    items: list[ItemScore]
    probes: int
    known: int | None = None
    known_threshold: float | None = None
    measures: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that were asked, in order."""
        return tuple(dict.fromkeys(item.form for item in self.items))

    def select(self, form: str, split: str) -> list[ItemScore]:
        """The items of one form and split."""
        return [item for item in self.items if item.form == form and item.split == split]

    def form_score(self, form: str, split: str) -> FormScore | None:
        """The mean scores of a form; None where it has no items."""
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
        """For each target the mean score of each of its forms."""
        result: dict[str, dict[str, float]] = {}
        for form in self.forms:
            for subject, items in by_subject(self.select(form, split)).items():
                result.setdefault(subject, {})[form] = mean(item.score for item in items)
        return result

    def worst(self, split: str = "forget") -> dict[str, tuple[str, float]]:
        """For each target the form that remembers most, with its score; multiple choice is left out.

        A guess scores 1/4 there, so its scores do not compare with those of answers in words.
        """
        result = {}
        for subject, scores in self.by_target(split).items():
            comparable = {form: score for form, score in scores.items() if form != "mcp"}
            if comparable:
                result[subject] = max(comparable.items(), key=lambda pair: pair[1])
        return result

    def worst_score(self, split: str = "forget") -> float | None:
        """Mean over targets of the form that remembers most; None where there is none."""
        found = [score for _, score in self.worst(split).values()]
        return mean(found) if found else None

    def known_probes(self, threshold: float) -> set[int]:
        """Indices of the probes that the model knows.

        Multiple choice decides where it was asked (mean over the orders of the options), else the best form.
        """
        known = set()
        probes: dict[int, list[ItemScore]] = {}
        for item in self.items:
            probes.setdefault(item.probe, []).append(item)
        for probe, items in probes.items():
            choices = [item.score for item in items if item.form == "mcp"]
            if (mean(choices) if choices else max(item.score for item in items)) >= threshold:
                known.add(probe)
        return known

    def restricted(self, probes: set[int], threshold: float) -> Evaluation:
        """The same scores without those of other probes.

        Raises:
            InputError: nothing about the forget set is left.
        """
        items = [item for item in self.items if item.probe in probes]
        if not any(item.split == "forget" for item in items):
            raise InputError(
                f"The model knows none of the {self.probes} probes to forget (scores of at least {threshold:g}); "
                "lower --known, or ask about better-known subjects."
            )
        return Evaluation(
            items, self.probes, len(probes), threshold, dict(self.measures), dict(self.settings), self.seconds
        )

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON values, with the means."""
        splits = [split for split in ("forget", "retain") if any(item.split == split for item in self.items)]
        means = {split: {form: self.form_score(form, split) for form in self.forms} for split in splits}
        return {
            "forms": {
                split: {form: asdict(score) for form, score in scores.items() if score is not None}
                for split, scores in means.items()
            },
            "worst": {s: {"form": form, "score": score} for s, (form, score) in self.worst().items()},
            "worst_score": self.worst_score(),
            "measures": self.measures,
            "probes": self.probes,
            "known": self.known,
            "known_threshold": self.known_threshold,
            "settings": self.settings,
            "seconds": self.seconds,
            "items": [asdict(item) for item in self.items],
        }


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean.

    Raises:
        RocrError: a value is not a finite number, which a mean would hide.
    """
    found = list(values)
    if not all(map(math.isfinite, found)):
        raise RocrError(f"{sum(not math.isfinite(v) for v in found)} of {len(found)} scores are not numbers.")
    return math.fsum(found) / len(found)


def by_subject(items: Iterable[ItemScore]) -> dict[str, list[ItemScore]]:
    """The items of each subject."""
    result: dict[str, list[ItemScore]] = {}
    for item in items:
        result.setdefault(item.subject, []).append(item)
    return result


def mean_over_targets(items: Iterable[ItemScore], value: Callable[[ItemScore], float]) -> float:
    """Mean over each target's items, then over targets."""
    return mean(mean(map(value, group)) for group in by_subject(items).values())


def _optional_mean(items: list[ItemScore], value: Callable[[ItemScore], float | None]) -> float | None:
    present = [item for item in items if value(item) is not None]
    return mean_over_targets(present, lambda item: value(item) or 0.0) if present else None
