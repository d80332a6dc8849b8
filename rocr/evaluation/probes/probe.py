"""A probe is a question with a known answer about a subject; every list of them must keep the rules here."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from rocr.concepts import folded
from rocr.errors import InputError
from rocr.io.spelling import hidden_characters

Split = Literal["forget", "retain"]
ProbeForm = Literal["qa", "fb", "mcp", "adversarial"]
Variant = Literal["translated", "misspelt", "abbreviated", "described"]
MAX_SHOWN_ERRORS = 50
MAX_TEXT_LENGTH = 20_000  # characters
_REFUSED = ("Cc", "Cf", "Cs")  # control, zero-width and bidirectional characters, halves of surrogate pairs
BLANK = "___"
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Wording:
    """Another wording of a probe's question; its answer where that changes too, as in another language."""

    query: str
    answer: str


@dataclass(frozen=True)
class Probe:
    """A question about a subject, and its answer.

    Attributes:
        subject: the concept that the question is about.
        query: the question; with `___` for the answer where `form` is "fb", with its options and a letter as
            answer where `form` is "mcp" and there are no distractors.
        answer: the answer.
        distractors: wrong answers, from which multiple-choice questions are made.
        form: what `query` is; the other forms are derived from a "qa" probe.
        split: whether the model is to forget or to keep this.
        cloze: the same question with a blank, for the form "fb"; None: derived from the question.
        wordings: other wordings of the question, by variant.
        place: where the probe was read, for messages.
    """

    subject: str
    query: str
    answer: str
    distractors: tuple[str, ...] = ()
    form: ProbeForm = "qa"
    split: Split = "forget"
    cloze: str | None = None
    wordings: Mapping[Variant, Wording] = field(default_factory=dict)
    place: str = ""


@dataclass
class Problems:
    """Every error of some files, reported together."""

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, sentence: str) -> None:
        """Note what is wrong somewhere."""
        self.count += 1
        if self.count <= MAX_SHOWN_ERRORS:
            self.lines.append(f"{place}: {sentence}")

    def raise_any(self) -> None:
        """Raise an InputError of all of them, if there are any."""
        if self.count:
            rest = [f"and {self.count - len(self.lines):,} more"] if self.count > len(self.lines) else []
            raise InputError("\n".join(self.lines + rest))


def check_all(probes: Sequence[Probe], problems: Problems, source: str) -> None:
    """Raise what is wrong with the probes of a source, together with the problems that were met while reading it.

    Raises:
        InputError: there is a problem, or there are no probes.
    """
    _check(probes, problems)
    problems.raise_any()
    if not probes:
        raise InputError(f"{source} holds no probes.")


def check_probes(probes: Sequence[Probe]) -> None:
    """Hold probes that were built in Python to the rules for files.

    Raises:
        InputError: names every probe that is wrong, by its place or its position in the list.
    """
    problems = Problems()
    _check([replace(p, place=p.place or f"probes[{i}]") for i, p in enumerate(probes)], problems)
    problems.raise_any()
    if not probes:
        raise InputError("The list of probes is empty.")


def split_by_subject(probes: Iterable[Probe], targets: Iterable[str]) -> list[Probe]:
    """The probes, those about the targets to be forgotten and all others to be kept.

    Raises:
        InputError: no probe is about any of the targets.
    """
    wanted = {folded(target) for target in targets}
    result = [replace(p, split="forget" if folded(p.subject) in wanted else "retain") for p in probes]
    if not any(probe.split == "forget" for probe in result):
        raise InputError(f"No probe is about any of the {len(wanted)} targets, such as {min(wanted, default='')!r}.")
    return result


def _check(probes: Sequence[Probe], problems: Problems) -> None:
    places: dict[tuple[str, ...], str] = {}
    for probe in probes:
        for flaw in _flaws(probe):
            problems.add(probe.place, flaw)
        key = (folded(probe.subject), folded(probe.query), probe.form, probe.split)
        first = places.setdefault(key, probe.place)
        if first != probe.place:
            problems.add(probe.place, f"is a duplicate of {first}: the same question about {probe.subject[:60]!r}")


def _is_refused(character: str) -> bool:
    return unicodedata.category(character) in _REFUSED and character not in "\t\r\n"


def _flaws(probe: Probe) -> Iterable[str]:
    for name, value in (("subject", probe.subject), ("query", probe.query), ("answer", probe.answer)):
        if not value.strip():
            yield f"has no {name}"
    wordings = [text for wording in probe.wordings.values() for text in (wording.query, wording.answer)]
    for text in (probe.subject, probe.query, probe.answer, probe.cloze or "", *probe.distractors, *wordings):
        if len(text) > MAX_TEXT_LENGTH:
            yield f"{text[:40]!r}... has {len(text):,} characters; the limit is {MAX_TEXT_LENGTH:,}"
        codes = sorted({f"U+{ord(text[i]):04X}" for i, _ in hidden_characters(text) if _is_refused(text[i])})
        if codes:
            yield f"{text[:40]!r} holds invisible characters: {', '.join(codes[:5])}"
    answer = folded(probe.answer)
    wrong = [folded(distractor) for distractor in probe.distractors]
    if answer and answer in wrong:
        yield f"the answer {probe.answer[:60]!r} is among the distractors"
    if len(set(wrong)) < len(wrong):
        yield "a distractor stands twice"
    if "" in wrong:
        yield "a distractor is empty"
    if probe.form not in get_args(ProbeForm):
        yield f"form must be one of {', '.join(get_args(ProbeForm))}, not {probe.form[:60]!r}"
    if probe.split not in get_args(Split):
        yield f"split must be one of {', '.join(get_args(Split))}, not {probe.split[:60]!r}"
    if probe.form == "fb" and BLANK not in probe.query:
        yield f"a question to complete needs a blank, {BLANK}"
    if probe.cloze is not None and BLANK not in probe.cloze:
        yield f"cloze needs a blank, {BLANK}"
    if probe.form == "mcp" and not wrong and probe.answer.strip() not in tuple(LETTERS):
        yield f"a multiple-choice question without distractors needs a letter as its answer, not {probe.answer[:60]!r}"
