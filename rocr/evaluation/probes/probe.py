"""Probes, which are questions about a subject with a known answer, and the rules that a list of probes must follow."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from rocr.concepts import Kind, folded
from rocr.errors import InputError
from rocr.io.spelling import hidden_characters

Split = Literal["forget", "retain"]
ProbeForm = Literal["qa", "fb", "mcp", "adversarial", "reverse"]
Language = Literal[
    "spanish", "chinese", "russian", "arabic", "french", "german", "hindi", "japanese", "korean", "portuguese"
]
Variant = Literal["translated", "misspelt", "abbreviated", "described", "lower", "surname", Language]
MAX_SHOWN_ERRORS = 50
MAX_TEXT_LENGTH = 20_000  # characters
_REFUSED = ("Cc", "Cf", "Cs")  # control characters; zero-width and bidirectional ones; lone surrogates
BLANK = "___"
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Wording:
    """Another wording of a probe's question.

    Attributes:
        query: The question in other words or in another language.
        answer: The answer to it, in the language of the question.
    """

    query: str
    answer: str


@dataclass(frozen=True)
class Probe:
    """A question about a subject, and its answer.

    Attributes:
        subject: The concept that the question is about.
        query: The question. If `form` is "fb", it has a blank `___` in place of the answer. If `form` is "mcp" and
            there are no distractors, it lists its options, and the answer is the letter of one.
        answer: The right answer.
        distractors: Wrong answers, used as options of multiple-choice questions.
        form: The form of `query`: "qa" (a plain question), "fb" (fill in the blank), "mcp" (multiple choice),
            "adversarial", or "reverse" (a plain question whose answer is the subject's name; only the forms "reverse",
            "reverse-fb" and "reverse-mcp" ask it). Other forms are derived from "qa" probes.
        split: "forget" if the model must forget the answer, "retain" if it must keep it.
        cloze: The question as a sentence with a blank `___`, for the form "fb"; None derives it from `query`.
        wordings: Other wordings of the question, by variant: "translated" (into any language), "misspelt",
            "abbreviated", "described", "lower", "surname", or a language: "spanish", "chinese", "russian", "arabic",
            "french", "german", "hindi", "japanese", "korean", "portuguese".
        namesake_of: The concept whose first or last word the subject has, if the probe is about a namesake. Such a
            probe is always of the split "retain". None for other probes.
        place: Where the probe was read, such as "file:line", for error messages.
        kind: "person" or "thing", what the subject is; None if it is not known. Only the name of a person has a
            surname, and that of a thing has no initials.
    """

    subject: str
    query: str
    answer: str
    distractors: tuple[str, ...] = ()
    form: ProbeForm = "qa"
    split: Split = "forget"
    cloze: str | None = None
    wordings: Mapping[Variant, Wording] = field(default_factory=dict)
    namesake_of: str | None = None
    place: str = ""
    kind: Kind | None = None


@dataclass
class Problems:
    """The errors found in a source, which are raised as one exception.

    Attributes:
        lines: The first MAX_SHOWN_ERRORS errors, each with its place.
        count: The number of all errors.
    """

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, sentence: str) -> None:
        """Add the error `place: sentence`."""
        self.count += 1
        if self.count <= MAX_SHOWN_ERRORS:
            self.lines.append(f"{place}: {sentence}")

    def raise_any(self) -> None:
        """Raise InputError with all errors if there are any."""
        if self.count:
            rest = [f"and {self.count - len(self.lines):,} more"] if self.count > len(self.lines) else []
            raise InputError("\n".join(self.lines + rest))


def check_all(probes: Sequence[Probe], problems: Problems, source: str) -> None:
    """Raise InputError if probes are invalid, if reading them met problems, or if there are none.

    Args:
        probes: Probes of one source.
        problems: Problems found while reading the source; those of the probes are added.
        source: Name of the source, for the message.
    """
    _check(probes, problems)
    problems.raise_any()
    if not probes:
        raise InputError(f"{source} holds no probes; give at least one.")


def check_probes(probes: Sequence[Probe]) -> None:
    """Check probes that were built in Python by the rules for files.

    Raises:
        InputError: If a probe is invalid or the list is empty; gives the place, or else the index, of each such probe.
    """
    problems = Problems()
    _check([replace(p, place=p.place or f"probes[{i}]") for i, p in enumerate(probes)], problems)
    problems.raise_any()
    if not probes:
        raise InputError("The list of probes is empty; give at least one.")


def split_by_subject(probes: Iterable[Probe], targets: Iterable[str]) -> list[Probe]:
    """Return the probes with the split "forget" for those about a target and "retain" for all others.

    Raises:
        InputError: If no probe is about a target or about a namesake of one.
    """
    wanted = {folded(target) for target in targets}
    result = [replace(p, split="forget" if folded(p.subject) in wanted else "retain") for p in probes]
    namesake = any(probe.namesake_of is not None and folded(probe.namesake_of) in wanted for probe in result)
    if not namesake and not any(probe.split == "forget" for probe in result):
        raise InputError(
            f"No probe is about any of the {len(wanted)} targets, such as {min(wanted, default='')!r}; each target "
            "must be the subject of a probe."
        )
    return result


def _check(probes: Sequence[Probe], problems: Problems) -> None:
    """Add to `problems` what is wrong with each probe, and every duplicate."""
    places: dict[tuple[str, ...], str] = {}
    for probe in probes:
        for flaw in _flaws(probe):
            problems.add(probe.place, flaw)
        key = (folded(probe.subject), folded(probe.query), probe.form, probe.split)
        first = places.setdefault(key, probe.place)
        if first != probe.place:
            problems.add(probe.place, f"is a duplicate of {first}: the same question about {probe.subject[:60]!r}")


def has_words(text: str, words: str) -> bool:
    """Return whether a text contains words, in any case, that are not parts of other words."""
    return re.search(rf"(?<!\w){re.escape(folded(words))}(?!\w)", folded(text)) is not None


def _is_refused(character: str) -> bool:
    """Return whether a character is invisible and changes how text is shown or read."""
    return unicodedata.category(character) in _REFUSED and character not in "\t\r\n"


def _flaws(probe: Probe) -> Iterable[str]:
    """Yield each rule that a probe breaks, as the rest of a sentence."""
    for name, value in (("subject", probe.subject), ("query", probe.query), ("answer", probe.answer)):
        if not value.strip():
            yield f"has no {name}"
    if isinstance(probe.distractors, str):
        yield f"distractors must be a list of texts, not the single text {probe.distractors[:60]!r}"
        return
    wordings = [text for wording in probe.wordings.values() for text in (wording.query, wording.answer)]
    others = (probe.cloze or "", probe.namesake_of or "", *probe.distractors, *wordings)
    for text in (probe.subject, probe.query, probe.answer, *others):
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
        yield "two distractors are the same"
    if "" in wrong:
        yield "a distractor is empty"
    if probe.form not in get_args(ProbeForm):
        yield f"form must be one of {', '.join(get_args(ProbeForm))}, not {probe.form[:60]!r}"
    if probe.split not in get_args(Split):
        yield f"split must be one of {', '.join(get_args(Split))}, not {probe.split[:60]!r}"
    if probe.kind is not None and probe.kind not in get_args(Kind):
        yield f"kind must be one of {', '.join(get_args(Kind))}, not {probe.kind[:60]!r}"
    if probe.form == "reverse" and answer and has_words(probe.query, probe.answer):
        yield f"a query of the form reverse must not contain its answer, {probe.answer[:60]!r}"
    if probe.namesake_of is not None:
        if not probe.namesake_of.strip():
            yield "namesake_of is empty; name the concept, or leave the field out"
        elif folded(probe.namesake_of) == folded(probe.subject):
            yield f"namesake_of is the subject itself, {probe.subject[:60]!r}"
    if probe.form == "fb" and BLANK not in probe.query:
        yield f"a query of the form fb must have a blank, {BLANK}"
    if probe.cloze is not None and BLANK not in probe.cloze:
        yield f"cloze must have a blank, {BLANK}"
    if probe.form == "mcp" and not wrong and probe.answer.strip() not in tuple(LETTERS):
        yield (
            f"a multiple-choice question without distractors must have a letter from A to {LETTERS[-1]} as its answer, "
            f"not {probe.answer[:60]!r}"
        )
