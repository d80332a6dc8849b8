"""What an evaluation says in words: how much was forgotten, what it cost, how sure that is, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rocr.evaluation.bootstrap import Interval, interval
from rocr.evaluation.glossary import flat_measures, form_title, measure_text
from rocr.evaluation.scores import CHOICE_FORMS, Evaluation, by_subject, mean, relative_fall

KNOWN_LEAST = 0.05
"""Share of the way from chance to 1 below which a score says that the model knows nothing in a form."""
LARGE = 0.1
"""Relative change for the worse from which a loss about the retain set stands out."""
LITTLE_GONE = 0.5
"""Share gone below which another redirect is recommended."""
FEW_SUBJECTS = 10
"""Number of subjects below which an interval is called rough."""
LISTED_FORMS = 3


@dataclass(frozen=True)
class Judgement:
    """What one form says about one split.

    Attributes:
        form: Form of the questions.
        split: "forget" or "retain".
        before: Score before the edit; None without an edit.
        after: Score after the edit, or of the model without an edit.
        chance: Score of a uniform guess; 0 if there are no options.
        gone: Share of the score above chance that the edit takes away; None without an edit.
        interval: Bootstrap interval of `gone`, or of the score without an edit; None if there is none.
        known: Whether the model knew something in this form before the edit; else `gone` says nothing.
        questions: Number of questions.
        subjects: Number of subjects.
    """

    form: str
    split: str
    before: float | None
    after: float
    chance: float
    gone: float | None
    interval: Interval | None
    known: bool
    questions: int
    subjects: int


@dataclass(frozen=True)
class Alarm:
    """A large change for the worse of something that an edit should keep.

    Attributes:
        name: A measure, or "retain" and a form.
        before: Its value before the edit.
        after: Its value after the edit.
        sentence: The change in words.
    """

    name: str
    before: float
    after: float
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """What an evaluation says.

    Attributes:
        sentence: What was forgotten, what it cost, and how sure that is.
        next_step: What to do next.
        judgements: What each form says, for each split.
        alarms: Large changes for the worse.
    """

    sentence: str
    next_step: str
    judgements: list[Judgement]
    alarms: list[Alarm] = field(default_factory=list)

    def of(self, form: str, split: str) -> Judgement | None:
        """Return the judgement of one form and split; None if it was not asked."""
        return next((j for j in self.judgements if (j.form, j.split) == (form, split)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return asdict(self)


def judge(evaluation: Evaluation, before: Evaluation | None = None) -> Verdict:
    """Return what an evaluation says, with intervals whose seed is that of the evaluation's settings.

    Args:
        evaluation: Evaluation of the edited model, or of a model without an edit.
        before: Evaluation of the same items before the edit; None without an edit.
    """
    judgements = [
        found
        for split in ("forget", "retain")
        for form in evaluation.forms
        if (found := _judge_form(form, split, evaluation, before)) is not None
    ]
    alarms = [] if before is None else _alarms(judgements, before, evaluation)
    if before is None:
        sentence, step = _sentence_alone(judgements), "Give an edit file with --edit to compare."
    else:
        forget = [found for found in judgements if found.split == "forget"]
        retain = [found for found in judgements if found.split == "retain"]
        sentence = "; ".join([_forgotten(forget), *_silent(forget), _cost(retain), *_sure(forget)]) + "."
        step = _next_step(forget, alarms)
    return Verdict(sentence, step, judgements, alarms)


def _judge_form(form: str, split: str, evaluation: Evaluation, before: Evaluation | None) -> Judgement | None:
    after_items = by_subject(evaluation.select(form, split))
    if not after_items:
        return None
    before_items = by_subject(before.select(form, split)) if before is not None else after_items
    rows = [
        (
            mean(item.score for item in before_items[subject]),
            mean(item.score for item in items),
            mean(item.chance or 0.0 for item in items),
        )
        for subject, items in after_items.items()
    ]
    old, new, chance = (mean(column) for column in zip(*rows, strict=True))
    seed = int(evaluation.settings.get("seed", 0))
    known = old - chance >= KNOWN_LEAST * (1 - chance)
    if known and form in CHOICE_FORMS:
        above = interval(rows, lambda means: means[:, 0] - means[:, 2], seed)
        known = above is None or above.low > 0
    if before is None:
        found = interval(rows, lambda means: means[:, 1], seed)
    else:
        found = interval(rows, _gone, seed) if known else None
    return Judgement(
        form=form,
        split=split,
        before=old if before is not None else None,
        after=new,
        chance=chance,
        gone=relative_fall(old, new, chance) if before is not None else None,
        interval=found,
        known=known,
        questions=sum(map(len, after_items.values())),
        subjects=len(rows),
    )


def _gone(means: Tensor) -> Tensor:
    """Return the relative fall of each sample of means of (before, after, chance); NaN where nothing was known."""
    old, new, chance = means.unbind(dim=1)
    return torch.where(old > chance, (old - new) / (old - chance), torch.nan)


def _alarms(judgements: Sequence[Judgement], before: Evaluation, after: Evaluation) -> list[Alarm]:
    found = [
        Alarm(
            f"retain {j.form}",
            j.before,
            j.after,
            f"{form_title(j.form)} about the retain set fell from {j.before:.2f} to {j.after:.2f}: {_percent(j.gone)} "
            f"of what the model knew is lost{_in_brackets(j)}.",
        )
        for j in judgements
        if j.split == "retain" and j.known and j.before is not None and j.gone is not None and j.gone >= LARGE
    ]
    new = flat_measures(after.measures)
    for name, old in flat_measures(before.measures).items():
        text = measure_text(name)
        if not text.retained or name not in new or not old:
            continue
        worse = (old - new[name]) / abs(old) if text.better == "higher" else (new[name] - old) / abs(old)
        if worse >= LARGE:
            moved = "fell" if text.better == "higher" else "rose"
            sentence = f"{name} {moved} from {old:.4g} to {new[name]:.4g}, by {_percent(worse)}. {text.meaning}"
            found.append(Alarm(name, old, new[name], sentence))
    return found


def _forgotten(forget: Sequence[Judgement]) -> str:
    if not forget:
        return "No question is about the forget set, so that forgetting is not measured"
    concepts = _count(max(j.subjects for j in forget), "concept")
    known = [j for j in forget if j.known]
    if not known:
        return f"{concepts}: the model knew nothing about them in any form that was asked"
    first, *rest = known
    text = (
        f"{concepts}: {_share(first)} of what the model knew in {form_title(first.form)} is gone{_in_brackets(first)}"
    )
    if 0 < len(rest) < LISTED_FORMS:
        text += "".join(f", {_share(j)} in {form_title(j.form)}{_in_brackets(j)}" for j in rest)
    elif rest:
        least, most = min(rest, key=lambda j: j.gone or 0.0), max(rest, key=lambda j: j.gone or 0.0)
        text += (
            f", and from {_share(least)} ({form_title(least.form)}) to {_share(most)} ({form_title(most.form)}) in "
            f"{len(rest)} other forms"
        )
    return text


def _silent(forget: Sequence[Judgement]) -> list[str]:
    """Return a clause about the forms in which the model knew nothing."""
    silent = [j for j in forget if not j.known]
    if not silent or len(silent) == len(forget):
        return []
    names = ", ".join(form_title(j.form) for j in silent)
    at = ", ".join(f"{j.before:.2f}" + (f" where chance is {j.chance:.2f}" if j.chance else "") for j in silent)
    says = "says nothing here" if len(silent) == 1 else "say nothing here"
    why = "was at chance" if all(j.chance for j in silent) else "knew nothing in this form"
    return [f"{names} {says}: the model {why} before ({at})"]


def _cost(retain: Sequence[Judgement]) -> str:
    known = [j for j in retain if j.known and j.gone is not None]
    if not retain:
        return "no question is about others, so that the cost is not measured"
    others = _count(max(j.subjects for j in retain), "other subject")
    if not known:
        return f"the model knew nothing about {others} either, so that the cost is not measured"
    worst = max(known, key=lambda j: j.gone or 0.0)
    title = form_title(worst.form)
    if (worst.gone or 0.0) <= 0:
        return f"of what it knew about {others} nothing is lost in any form"
    return f"of what it knew about {others} at most {_percent(worst.gone)} is lost, in {title}{_in_brackets(worst)}"


def _sure(forget: Sequence[Judgement]) -> list[str]:
    """Return a clause about how little few subjects say."""
    subjects = max((j.subjects for j in forget), default=0)
    if subjects == 1:
        return ["one concept gives no interval: ask about more before you rely on it"]
    return [f"intervals over {subjects} concepts are rough"] if 1 < subjects < FEW_SUBJECTS else []


def _sentence_alone(judgements: Sequence[Judgement]) -> str:
    subjects = _count(max(j.subjects for j in judgements), "subject")
    known = [j for j in judgements if j.known]
    if not known:
        return f"No edit: the model knows nothing about {subjects} in any form that was asked."
    best = max(known, key=lambda j: (j.after - j.chance) / (1 - j.chance))
    return (
        f"No edit: of {subjects} the model knows most in {form_title(best.form)}, with a score of {best.after:.2f}"
        f"{_in_brackets(best, scores=True)}."
    )


def _next_step(forget: Sequence[Judgement], alarms: Sequence[Alarm]) -> str:
    known = [j for j in forget if j.known and j.gone is not None]
    if not known:
        return "Ask questions that the model can answer: other --probes or --forms, or a list of better-known concepts."
    if min(j.gone or 0.0 for j in known) < LITTLE_GONE:
        return "Another redirect may forget more: `rocr redirects` compares some, and --redirect auto chooses one."
    if alarms:
        return "See which subjects lost most (--html); another redirect or --key-tokens last may spare them."
    if max(j.subjects for j in known) == 1:
        return "Ask about more concepts, and see what attacks bring back: --attacks all."
    return "See what attacks bring back (--attacks all), then check the output folder with `rocr verify`."


def _in_brackets(judgement: Judgement, scores: bool = False) -> str:
    found = judgement.interval
    if found is None:
        return ""
    ends = f"{found.low:.2f} to {found.high:.2f}" if scores else f"{_percent(found.low)} to {_percent(found.high)}"
    return f" (95% interval {ends})"


def _share(judgement: Judgement) -> str:
    """Return the share that is gone, "nothing" if the score rose."""
    return "nothing" if judgement.gone is None or round(judgement.gone, 2) <= 0 else _percent(judgement.gone)


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0.0):.0f}%"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
