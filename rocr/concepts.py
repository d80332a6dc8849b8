"""The concepts to unlearn, and the rules that every list of them must keep."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rocr.errors import InputError
from rocr.io.concept_files import FIELDS, read_fields
from rocr.io.spelling import hidden_characters, without_ignorable

MAX_NAME_LENGTH = 200  # characters
MAX_SHOWN_ERRORS = 50
MAX_NAMES = 200_000  # with aliases, in one list; checking them takes some seconds
MAX_CONCEPTS = 10_000
"""Concepts of one edit unless more are allowed: the longest list whose time and memory were measured (README)."""


@dataclass(frozen=True)
class Concept:
    """A name to unlearn, its other names, and the harmless concept that takes its place."""

    name: str
    redirect: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name, then the aliases."""
        return (self.name, *self.aliases)


def load_concepts(path: str | os.PathLike[str], default_redirect: str | None = None) -> list[Concept]:
    """Read a concept file.

    `.txt` has a concept a line, `name | alias | alias -> redirect`, where aliases and redirect may be left
    out; a `#` that begins a line, or stands between spaces, begins a comment. `.csv` has a header with the
    columns name, redirect and aliases (separated by `|`); `.jsonl` has an object with these fields a line,
    aliases being a list. All are UTF-8, of at most 64 MiB; a name has at most 200 characters, and a
    list 200,000 names with aliases.

    Args:
        path: the file.
        default_redirect: the redirect of concepts that have none of their own.

    Raises:
        InputError: the file cannot be read, or lines of it are wrong; names every line, up to 50 of them.
    """
    path = Path(path)
    if default_redirect is not None and (flaw := _flaw("default redirect", default_redirect)):
        raise InputError(f"The {flaw}.")
    problems = _Problems(lambda line: f"{path}:{line}")
    concepts = _checked(read_fields(path, problems.add), problems, default_redirect)
    problems.raise_any()
    if not concepts:
        raise InputError(f"{path} holds no concepts.")
    return concepts


def check_concepts(concepts: Iterable[Concept]) -> None:
    """Hold concepts that were built in Python to the rules for concept files.

    Raises:
        InputError: names every concept that is wrong by its position in the list, up to 50 of them.
    """
    problems = _Problems(lambda position: f"concepts[{position}]")
    numbered: list[tuple[int, Mapping[str, object]]] = []
    for position, concept in enumerate(concepts):
        if isinstance(concept, Concept):
            numbered.append((position, {name: getattr(concept, name) for name in FIELDS}))
        else:
            problems.add(position, f"must be a Concept, not {_kind(concept)}")
    _checked(numbered, problems, default_redirect=None)
    problems.raise_any()
    if not numbered:
        raise InputError("The list of concepts is empty.")


def check_length(count: int, most: int = MAX_CONCEPTS) -> None:
    """Refuse an edit of more concepts than are allowed; time and memory grow faster than their number.

    Raises:
        InputError: there are more.
    """
    if count > most:
        raise InputError(
            f"The list has {count:,} concepts, above the limit of {most:,} for one edit. Make lists of fewer, or allow "
            "it by --allow-long-list (Guards(concepts=...)); add --dry-run to see first how long it takes and how much "
            "memory it needs."
        )


def check_names(label: str, names: Iterable[object]) -> None:
    """Hold names that stand in no list of concepts, such as those of `--control`, to the rules for one.

    Args:
        label: what a name is called in the message.
        names: the names.

    Raises:
        InputError: names every one that is wrong, up to 50 of them.
    """
    flaws = [flaw for name in names if (flaw := _flaw(label, name))]
    if flaws:
        more = [f"and {len(flaws) - MAX_SHOWN_ERRORS:,} more"] if len(flaws) > MAX_SHOWN_ERRORS else []
        raise InputError("\n".join([*flaws[:MAX_SHOWN_ERRORS], *more]))


def check_text(label: str, value: object, limit: int) -> None:
    """Refuse what cannot be put before a model as a text.

    Raises:
        InputError: it is no text, is blank, is longer than `limit` characters, or was not UTF-8.
    """
    if not isinstance(value, str):
        raise InputError(f"{label} must be text, not {_kind(value)}.")
    if not value.strip():
        raise InputError(f"{label} is empty.")
    if len(value) > limit:
        raise InputError(f"{label} has {len(value):,} characters; the limit is {limit:,}.")
    if any(unicodedata.category(character) == "Cs" for character in value):
        raise InputError(f"{label} {_shown(value)} is not UTF-8, or holds half of a surrogate pair.")


@dataclass
class _Problems:
    """Every error of one list of concepts: keeps as many as are shown and counts the rest."""

    place: Callable[[int], str]
    kept: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0

    def add(self, number: int, sentence: str) -> None:
        self.count += 1
        if len(self.kept) < MAX_SHOWN_ERRORS:
            self.kept.append((number, sentence))

    def raise_any(self) -> None:
        if not self.kept:
            return
        self.kept.sort(key=lambda problem: problem[0])
        lines = [f"{self.place(number)}: {sentence}" for number, sentence in self.kept]
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines):,} more")
        raise InputError("\n".join(lines))


def _checked(
    numbered_fields: Iterable[tuple[int, Mapping[str, object]]],
    problems: _Problems,
    default_redirect: str | None,
) -> list[Concept]:
    """Apply every rule; a text that broke one is reported, and empty in what is returned."""
    numbered, names = [], 0
    for number, fields in numbered_fields:
        aliases = fields.get("aliases")
        names += 1 + (len(aliases) if isinstance(aliases, list | tuple) else 0)
        if names > MAX_NAMES:
            raise InputError(f"{problems.place(number)}: more than {MAX_NAMES:,} names; make lists of fewer.")
        numbered.append((number, _concept(number, fields, problems, default_redirect)))
    owners = _owners(numbered, problems)
    for number, concept in numbered:
        owner, _ = owners.get(folded(concept.redirect), (None, ""))
        if owner == number:
            problems.add(number, f"the redirect {_shown(concept.redirect)} is the concept itself")
        elif owner is not None:
            place = problems.place(owner)
            problems.add(number, f"the redirect {_shown(concept.redirect)} is itself a target ({place})")
    return [concept for _, concept in numbered]


def _owners(numbered: Sequence[tuple[int, Concept]], problems: _Problems) -> dict[str, tuple[int, str]]:
    """Map each folded name and alias to the number of its concept and to how it is written there."""
    owners: dict[str, tuple[int, str]] = {}
    for number, concept in numbered:
        for name, count in Counter(filter(None, concept.names)).items():
            if count > 1:
                problems.add(number, f"{_shown(name)} stands {count} times among the names of one concept")
            owner, spelling = owners.setdefault(folded(name), (number, name))
            if owner != number:
                place = problems.place(owner)
                problems.add(number, f"{_shown(name)} is a duplicate of {_shown(spelling)} ({place})")
    return owners


def _concept(number: int, fields: Mapping[str, object], problems: _Problems, default_redirect: str | None) -> Concept:
    for unknown in fields:
        if unknown not in FIELDS:
            problems.add(number, f"unknown field {_shown(unknown)}; the fields are {', '.join(FIELDS)}")

    def text(label: str, value: object) -> str:
        if flaw := _flaw(label, value):
            problems.add(number, flaw)
            return ""
        return str(value)

    name = redirect = ""
    if "name" in fields:
        name = text("name", fields["name"])
    else:
        problems.add(number, "has no field 'name'")
    if "redirect" in fields:
        redirect = text("redirect", fields["redirect"])
    elif default_redirect is not None:
        redirect = default_redirect
    else:
        problems.add(number, "has no redirect; write one, or give a default redirect (--redirect)")
    aliases = fields.get("aliases", ())
    if not isinstance(aliases, list | tuple):
        problems.add(number, f"field 'aliases' must be a list of texts, not {_kind(aliases)}")
        aliases = ()
    return Concept(name, redirect, tuple(text("alias", alias) for alias in aliases))


def _flaw(label: str, value: object) -> str | None:
    """Say why a value cannot be a name."""
    if not isinstance(value, str):
        return f"{label} must be text, not {_kind(value)}"
    if not value.strip():
        return f"{label} is empty"
    shown = f"{label} {_shown(value)}"
    if len(value) > MAX_NAME_LENGTH:
        return f"{shown} has {len(value):,} characters; the limit is {MAX_NAME_LENGTH}"
    for index, kind in hidden_characters(value):
        code_point = f"U+{ord(value[index]):04X} {unicodedata.name(value[index], '')}".rstrip()
        return f"{shown} holds {code_point}, {kind}, as character {index + 1}"
    return f"{shown} begins or ends with white space" if value != value.strip() else None


def folded(name: str) -> str:
    """Return what two spellings of a name share: Unicode's NFKC_Casefold, with runs of white space as one space.

    It leaves out what is not seen (default ignorable code points): a name with and without its joiners is one name.
    """
    name = without_ignorable(name)
    for _ in range(2):  # folding can leave a text that is not NFKC, and NFKC one that is not folded
        name = without_ignorable(unicodedata.normalize("NFKC", unicodedata.normalize("NFD", name).casefold()))
    return " ".join(name.split())


def holds_name(text: str, name: str) -> bool:
    """Whether a text holds a name, in whichever Unicode form either is written."""
    return name in text or unicodedata.normalize("NFC", name) in unicodedata.normalize("NFC", text)


def with_name(text: str, name: str, other: str) -> str:
    """A text with another name in the place of one that it holds; see `holds_name`."""
    if name in text:
        return text.replace(name, other)
    return unicodedata.normalize("NFC", text).replace(unicodedata.normalize("NFC", name), other)


def _shown(text: str) -> str:
    """Quote a text of any length and content for a message: short, on one line, nothing invisible."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _kind(value: object) -> str:
    kind = type(value).__name__
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(kind, kind)
