"""Conditions on scores, such as "forget.fb.gone<0.8", under which `rocr eval` fails: for pipelines."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocr.errors import GuardError, InputError

if TYPE_CHECKING:
    from rocr.evaluation.scores import Evaluation

_COMPARED: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
NOT_KNOWN = (
    " That says nothing: before the edit the model knew too little in this form (not known in the table). Leave the "
    "condition out, or give questions that the model can answer."
)
_PATTERN = re.compile(
    r"(forget|retain)\.([\w-]+)\.(before|after|gone|lost)\s*(<=|>=|<|>)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)"
)


@dataclass(frozen=True)
class Condition:
    """A comparison of a score with a number.

    Attributes:
        text: The condition as it was given.
        split: "forget" or "retain".
        form: The form of the questions.
        value: "before" and "after" are mean scores; "gone" and "lost" are both the share of the score above chance
            that the edit takes away.
        relation: "<", "<=", ">" or ">=".
        limit: The number.
    """

    text: str
    split: str
    form: str
    value: str
    relation: str
    limit: float

    @classmethod
    def parse(cls, text: str, forms: Sequence[str], with_edit: bool) -> Condition:
        """Read a condition.

        Args:
            text: Such as "retain.mcp.lost > 0.05".
            forms: The forms that are asked.
            with_edit: Whether an edit is evaluated, so that there are scores before and after it.

        Raises:
            InputError: The text is no condition, or is about a form or a moment that is not evaluated.
        """
        found = _PATTERN.fullmatch(text.strip())
        try:
            limit = float(found[5]) if found else None
        except ValueError:
            limit = None
        if found is None or limit is None:
            raise InputError(
                f"--fail-if {text[:100]!r} is no condition such as forget.fb.gone<0.8: a set (forget, retain), a form, "
                "a value (before, after, gone, lost), one of < <= > >=, and a number, joined by full stops."
            )
        condition = cls(text, found[1], found[2], found[3], found[4], limit)
        if condition.form not in forms:
            raise InputError(
                f"--fail-if {text[:100]!r} is about the form {condition.form!r}, but the forms asked are "
                f"{', '.join(forms)}: add it to --forms."
            )
        if condition.value != "after" and not with_edit:
            raise InputError(
                f"--fail-if {text[:100]!r} compares with the model before an edit: give the edit with --edit, or use "
                f"{condition.split}.{condition.form}.after."
            )
        return condition

    def failure(self, after: Evaluation, before: Evaluation | None, warn: Callable[[str], None]) -> str | None:
        """Return a sentence if the condition holds or its score does not exist; None if it does not hold.

        `warn` is called with a sentence if it does not hold, but says nothing.
        """
        found = self._value(after, before)
        if found is None:
            return f"{self.text}: there is no score, since no question of the {self.split} set was asked in this form."
        holds = _COMPARED[self.relation](found, self.limit)
        doubt = "" if self._is_known(after, before) else NOT_KNOWN
        if not holds and doubt:
            warn(f"{self.text}: it does not hold, since it is {found:.4g}.{doubt}")
        return f"{self.text}: it is {found:.4g}.{doubt}" if holds else None

    def _is_known(self, after: Evaluation, before: Evaluation | None) -> bool:
        """Whether the condition is about a form in which the model knew something before, or about no change."""
        from rocr.evaluation.verdict import judge

        if self.value in ("before", "after"):
            return True
        found = judge(after, before).of(self.form, self.split)
        return found is None or found.known

    def _value(self, after: Evaluation, before: Evaluation | None) -> float | None:
        from rocr.evaluation.scores import compare_evaluations

        evaluation = before if self.value == "before" else after
        if self.value in ("before", "after"):
            score = None if evaluation is None else evaluation.form_score(self.form, self.split)
            return None if score is None else score.score
        assert before is not None, "a condition on a change is checked with an edit only"
        changes = compare_evaluations(before, after).changes
        falls = [change.fall for change in changes if (change.form, change.split) == (self.form, self.split)]
        return falls[0] if falls else None


def check_conditions(
    conditions: Sequence[Condition], after: Evaluation, before: Evaluation | None, warn: Callable[[str], None]
) -> None:
    """Raise GuardError, naming every condition that holds.

    Args:
        conditions: The conditions.
        after: Scores of the model, with the edit if there is one.
        before: Scores before the edit. None without an edit.
        warn: Called with a sentence for each condition that does not hold, but says nothing.
    """
    failures = [failure for each in conditions if (failure := each.failure(after, before, warn)) is not None]
    if failures:
        raise GuardError("The evaluation fails by --fail-if.\n" + "\n".join(failures))
