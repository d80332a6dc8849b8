"""The questions on the page of an evaluation: an example of each form, and all questions of each subject."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rocr.concepts import folded
from rocr.evaluation.glossary import FORM_TEXTS, form_title
from rocr.evaluation.page_parts import table
from rocr.evaluation.report import NOT_KNOWN, About
from rocr.evaluation.scores import Evaluation, FreeAnswer, ItemScore, by_subject, mean, mean_over_targets
from rocr.evaluation.verdict import Judgement, Verdict
from rocr.io.svg import escaped


class Questions:
    """The parts of the page that show questions: an example of each form, and all questions of each subject."""

    def __init__(self, evaluation: Evaluation, before: Evaluation | None, verdict: Verdict, about: About) -> None:
        self._verdict = verdict
        self._redirects = {folded(name): redirect for name, redirect in about.redirects.items()}
        old: Sequence[ItemScore | None] = before.items if before is not None else [None] * len(evaluation.items)
        self._pairs = list(zip(old, evaluation.items, strict=True))
        self._edited = before is not None
        self._new = {answer.probe: answer for answer in evaluation.answers}
        self._old = {answer.probe: answer for answer in before.answers} if before is not None else {}

    def form(self, form: str) -> str:
        """Return what a form asks, with an example: the question about the forget set that was known best."""
        asked = [pair for pair in self._pairs if pair[1].form == form]
        wanted = [pair for pair in asked if pair[1].split == "forget"] or asked
        old, new = max(wanted, key=lambda pair: (pair[0] or pair[1]).score)
        judgement = self._verdict.of(form, new.split)
        text = FORM_TEXTS[form].asks if form in FORM_TEXTS else ""
        title = form_title(form)
        parts = [f"<h3>{escaped(title[:1].upper() + title[1:])} <code>{escaped(form)}</code></h3>"]
        parts.append(f"<p>{escaped(text[:1].upper() + text[1:])}.</p>")
        if judgement is not None and not judgement.known:
            parts.append(f'<p class="mark">{escaped(_silence(judgement, self._edited))}</p>')
        if new.question:
            facts = [("Right answer", new.answer), ("Its score", self._change(old, new))]
            if new.form == "qa":
                facts += [(f"Answer{when}", answer.text) for when, answer in self._answers(new.probe)]
            listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(fact)}</dd>" for name, fact in facts)
            parts.append(
                f"<p>For example:</p><blockquote>{escaped(new.question.strip())}</blockquote><dl>{listed}</dl>"
            )
        return f'<article class="form">{"".join(parts)}</article>'

    def subjects(self, split: str) -> str:
        """Return an entry for each subject of a split, which opens to its questions; the worst come first."""
        before = by_subject(old for old, new in self._pairs if old is not None and new.split == split)
        after = by_subject(new for _, new in self._pairs if new.split == split)
        silent = {j.form for j in self._verdict.judgements if j.split == split and not j.known}

        def worth(subject: str) -> float:
            """What is left of a concept, or lost about a kept subject, in the forms in which something was known."""
            lists = [items for items in (after[subject], before.get(subject)) if items]
            means = [mean(found) for items in lists if (found := [i.score for i in items if i.form not in silent])]
            return (means[0] if split == "forget" or len(means) < 2 else means[1] - means[0]) if means else -1.0

        entries = "".join(
            self._subject(subject, before.get(subject, []), after[subject], silent)
            for subject in sorted(after, key=worth, reverse=True)
        )
        first = "those of which most is left" if split == "forget" else "those about which most is lost"
        left_out = f" {', '.join(map(form_title, sorted(silent)))} not counted: nothing was known." if silent else ""
        note = f"{len(after):,} in all, {first} first.{left_out} Open one to see its questions."
        return f"<p>{escaped(note)}</p>{entries}"

    def _subject(self, subject: str, before: list[ItemScore], after: list[ItemScore], silent: set[str]) -> str:
        redirect = self._redirects.get(folded(subject))
        name = f"<b>{escaped(subject)}</b>" + (f" → {escaped(redirect)}" if redirect else "")
        chips = []
        for form in dict.fromkeys(item.form for item in after):
            scores = [
                f"{mean_over_targets(found, lambda item: item.score):.2f}"
                for items in (before, after)
                if (found := [item for item in items if item.form == form])
            ]
            mark = f" ({NOT_KNOWN})" if form in silent else ""
            chips.append(f'<span class="chip">{escaped(form)} {" → ".join(scores)}{mark}</span>')
        body = self._item_table(subject, before, after) + self._answer_table(subject, after)
        return f"<details><summary>{name} {' '.join(chips)}</summary>{body}</details>"

    def _item_table(self, subject: str, before: list[ItemScore], after: list[ItemScore]) -> str:
        old: Sequence[ItemScore | None] = before or [None] * len(after)
        rows: list[tuple[str, ...]] = [
            (
                new.form,
                shown_question(new.question),
                new.answer,
                "" if was is None else f"{was.score:.3f}",
                f"{new.score:.3f}",
            )
            for was, new in sorted(zip(old, after, strict=True), key=lambda pair: pair[1].probe)
        ]
        columns = ["form", "question", "right answer", "before", "after"]
        if not self._edited:
            rows, columns = [(*row[:3], row[4]) for row in rows], [*columns[:3], "score"]
        return table(f"Questions about {subject}", columns, rows)

    def _answer_table(self, subject: str, items: Iterable[ItemScore]) -> str:
        rows = [
            (new.question, new.answer, *(f"{answer.text}\n[{_contains(answer)}]" for _, answer in found))
            for probe in dict.fromkeys(item.probe for item in items)
            if (found := self._answers(probe)) and (new := self._new.get(probe)) is not None
        ]
        if not rows:
            return ""
        columns = ("question", "right answer", *(("before", "after") if self._edited else ("answer",)))
        return table(f"Free answers about {subject}", columns, rows)

    def _answers(self, probe: int) -> list[tuple[str, FreeAnswer]]:
        """Return the free answers to a probe, each with when it was given."""
        found = [(" before", self._old.get(probe)), (" after" if self._edited else "", self._new.get(probe))]
        return [(when, answer) for when, answer in found if answer is not None]

    @staticmethod
    def _change(old: ItemScore | None, new: ItemScore) -> str:
        return f"{new.score:.3f}" if old is None else f"{old.score:.3f} before, {new.score:.3f} after"


def shown_question(message: str) -> str:
    """Return a message without the instruction and the example before its question."""
    return message.rpartition("Question: ")[2].strip()


def _contains(answer: FreeAnswer) -> str:
    return "has the right answer" if answer.contained else "has not"


def _silence(judgement: Judgement, edited: bool) -> str:
    score = judgement.before if judgement.before is not None else judgement.after
    chance = f", where chance is {judgement.chance:.2f}" if judgement.chance else ""
    when = " before the edit" if edited else ""
    return f"The model knew nothing in this form{when}: {score:.2f}{chance}. It says nothing about forgetting."
