"""Two evaluations of the same items, before and after an edit: how much of what was known is gone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rocr.errors import InputError
from rocr.evaluation.scores import Evaluation


@dataclass(frozen=True)
class FormChange:
    """One form and split before and after.

    Attributes:
        form: how the questions were asked.
        split: "forget" or "retain".
        before: score before.
        after: score after.
        chance: score of a guess, where there is one.
        fall: share of the score before that is gone; of what exceeds chance, where there is chance.
        items: number of items.
        targets: number of targets.
        derived: number of items whose question was made from one of another form.
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
    """Every form and measure before and after, and for each target the form that remembers most after."""

    changes: list[FormChange]
    worst: dict[str, tuple[str, float]]
    measures: dict[str, tuple[Any, Any]]

    def change(self, form: str, split: str) -> FormChange | None:
        """The change of one form; None where it was not asked."""
        return next((c for c in self.changes if (c.form, c.split) == (form, split)), None)

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "changes": [asdict(change) for change in self.changes],
            "worst": {s: {"form": form, "score": score} for s, (form, score) in self.worst.items()},
            "measures": {name: {"before": pair[0], "after": pair[1]} for name, pair in self.measures.items()},
        }


def compare_evaluations(before: Evaluation, after: Evaluation) -> Comparison:
    """Compare two evaluations of the same items.

    Raises:
        InputError: they are not of the same items.
    """
    if [(i.probe, i.form, i.split) for i in before.items] != [(i.probe, i.form, i.split) for i in after.items]:
        raise InputError(
            f"The evaluations are of different items ({len(before.items)} and {len(after.items)}): "
            "use the same probes, forms, seed and filter for both."
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
    """Share of what exceeds chance that is gone; 0 where nothing exceeded it."""
    return (before - after) / (before - chance) if before > chance else 0.0
