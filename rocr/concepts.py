"""The concepts to unlearn, and the checks of a list of concepts."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rocr.argument_checks import check_path
from rocr.errors import InputError
from rocr.io.concept_files import FIELDS, read_fields
from rocr.io.spelling import hidden_characters, without_ignorable

MAX_NAME_LENGTH = 200  # characters
MAX_SHOWN_ERRORS = 50
MAX_NAMES = 200_000  # in one list, with aliases; checking them takes some seconds
MAX_CONCEPTS = 10_000
"""Default limit of the concepts of one edit: the longest list that was measured (docs/large-lists.md)."""
Kind = Literal["person", "thing"]
AUTO = "auto"
"""The redirect of a concept for which one is chosen; see `rocr.edit.automatic_redirects`."""


@dataclass(frozen=True)
class Concept:
    """A concept to unlearn.

    Attributes:
        name: The name of the concept.
        redirect: The harmless concept that the model perceives in its place. "auto" leaves the choice to
            `rocr.unlearn`, see `rocr.edit.automatic_redirects`.
        aliases: Other names of the concept, which are redirected too.
        kind: "person" or "thing": the questions "Who is {}?" ask "What is {}?" of a thing, see `for_kind`. None, for
            an unknown kind, has the questions of a person.
    """

    name: str
    redirect: str
    aliases: tuple[str, ...] = ()
    kind: Kind | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The name, followed by the aliases."""
        return (self.name, *self.aliases)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, without a kind that is not known."""
        values = asdict(self)
        if self.kind is None:
            del values["kind"]
        return values


def load_concepts(path: str | os.PathLike[str], default_redirect: str | None = None) -> list[Concept]:
    """Read a concept file.

    A `.txt` file has one concept on each line, `name | alias | alias -> redirect`, in which aliases and redirect are
    optional; a `#` at the start of a line or between spaces starts a comment. A `.csv` file has a header with the
    columns name, redirect, kind and aliases, which are separated by `|`. A `.jsonl` file has an object with these
    fields on each line, in which aliases is a list. The kind is "person" or "thing", or left out. Files are UTF-8 and
    have at most 64 MiB. A name has at most 200 characters, and a list at most 200,000 names with aliases.

    Args:
        path: The file.
        default_redirect: The redirect of concepts without one. None requires a redirect for every concept.

    Returns:
        The concepts, in the order of the file.

    Raises:
        InputError: The file cannot be read, or lines are not valid; the message has one line for each error, up to 50.
    """
    check_path("path", path)
    path = Path(path)
    if default_redirect is not None and (flaw := _flaw("default redirect", default_redirect)):
        raise InputError(f"The {flaw}.")
    problems = _Problems(lambda line: f"{path}:{line}")
    concepts = _checked(read_fields(path, problems.add), problems, default_redirect)
    problems.raise_any()
    if not concepts:
        raise InputError(f"{path} contains no concepts.")
    return concepts


def check_concepts(concepts: Iterable[Concept]) -> None:
    """Check a list of concepts that was built in Python, by the rules for concept files.

    Raises:
        InputError: Concepts are not valid; the message has one line for each error, up to 50, with the index of the
            concept.
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
    """Raise InputError if an edit has more concepts than are allowed.

    Time and memory of an edit grow faster than the number of concepts.
    """
    if count > most:
        raise InputError(
            f"The list has {count:,} concepts, above the limit of {most:,} for one edit. Use a shorter list, or allow "
            "it with --allow-long-list (in Python, Guards(concepts=...)); --dry-run shows the time and the memory "
            "that it needs."
        )


def check_names(label: str, names: Iterable[object]) -> None:
    """Check names outside of a list of concepts, such as those of `--control`, by the rules for concepts.

    Args:
        label: What to call a name in the message.
        names: The names.

    Raises:
        InputError: Names are not valid; the message has one line for each of them, up to 50.
    """
    flaws = [flaw for name in names if (flaw := _flaw(label, name))]
    if flaws:
        more = [f"and {len(flaws) - MAX_SHOWN_ERRORS:,} more"] if len(flaws) > MAX_SHOWN_ERRORS else []
        raise InputError("\n".join([*flaws[:MAX_SHOWN_ERRORS], *more]))


def check_text(label: str, value: object, limit: int) -> None:
    """Raise InputError unless a value can be a text for a model.

    Args:
        label: What to call the value in the message.
        value: The value. It must be a string that is not blank and is valid as UTF-8.
        limit: Maximum number of characters.
    """
    if not isinstance(value, str):
        raise InputError(f"{label} must be text, not {_kind(value)}.")
    if not value.strip():
        raise InputError(f"{label} is empty.")
    if len(value) > limit:
        raise InputError(f"{label} has {len(value):,} characters; the limit is {limit:,}.")
    if any(unicodedata.category(character) == "Cs" for character in value):
        raise InputError(f"{label} {_shown(value)} is not UTF-8, or contains half of a surrogate pair.")


@dataclass
class _Problems:
    """The errors of one list of concepts. It stores those that are shown and counts the rest."""

    place: Callable[[int], str]
    shown: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0

    def add(self, number: int, sentence: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_SHOWN_ERRORS:
            self.shown.append((number, sentence))

    def raise_any(self) -> None:
        if not self.shown:
            return
        self.shown.sort(key=lambda problem: problem[0])
        lines = [f"{self.place(number)}: {sentence}" for number, sentence in self.shown]
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines):,} more")
        raise InputError("\n".join(lines))


def _checked(
    numbered_fields: Iterable[tuple[int, Mapping[str, object]]],
    problems: _Problems,
    default_redirect: str | None,
) -> list[Concept]:
    """Return the concepts of a list and report all errors. A text with an error is empty in the result."""
    numbered, names = [], 0
    for number, fields in numbered_fields:
        aliases = fields.get("aliases")
        names += 1 + (len(aliases) if isinstance(aliases, list | tuple) else 0)
        if names > MAX_NAMES:
            raise InputError(f"{problems.place(number)}: more than {MAX_NAMES:,} names; split the list.")
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
    """Return for each folded name and alias the number of its concept and its spelling there."""
    owners: dict[str, tuple[int, str]] = {}
    for number, concept in numbered:
        for name, count in Counter(filter(None, concept.names)).items():
            if count > 1:
                problems.add(number, f"{_shown(name)} occurs {count} times among the names of one concept")
            owner, spelling = owners.setdefault(folded(name), (number, name))
            if owner != number:
                place = problems.place(owner)
                problems.add(number, f"{_shown(name)} is a duplicate of {_shown(spelling)} ({place})")
    return owners


def _concept(number: int, fields: Mapping[str, object], problems: _Problems, default_redirect: str | None) -> Concept:
    """Return the concept of the fields of a file, and report all errors."""
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
        problems.add(number, "has no redirect; add one, or give a default (--redirect NAME, or --redirect auto)")
    aliases = fields.get("aliases", ())
    if not isinstance(aliases, list | tuple):
        problems.add(number, f"field 'aliases' must be a list of texts, not {_kind(aliases)}")
        aliases = ()
    kind = fields.get("kind")
    if kind is not None and kind not in get_args(Kind):
        shown = _shown(kind) if isinstance(kind, str) else _kind(kind)
        problems.add(number, f"kind must be {' or '.join(get_args(Kind))}, or left out, not {shown}")
        kind = None
    return Concept(name, redirect, tuple(text("alias", alias) for alias in aliases), cast(Kind | None, kind))


def _flaw(label: str, value: object) -> str | None:
    """Return why a value cannot be a name; None if it can."""
    if not isinstance(value, str):
        return f"{label} must be text, not {_kind(value)}"
    if not value.strip():
        return f"{label} is empty"
    shown = f"{label} {_shown(value)}"
    if len(value) > MAX_NAME_LENGTH:
        return f"{shown} has {len(value):,} characters; the limit is {MAX_NAME_LENGTH}"
    for index, kind in hidden_characters(value):
        code_point = f"U+{ord(value[index]):04X} {unicodedata.name(value[index], '')}".rstrip()
        return f"{shown} contains {code_point}, {kind}, as character {index + 1}"
    return f"{shown} begins or ends with white space" if value != value.strip() else None


def folded(name: str) -> str:
    """Return a form that is equal for two spellings of a name.

    It is Unicode's NFKC_Casefold with each run of white space replaced by one space. It has no default ignorable code
    points, so a name with and without joiners has the same form.
    """
    name = without_ignorable(name)
    for _ in range(2):  # case folding can undo NFKC, and NFKC can undo case folding
        name = without_ignorable(unicodedata.normalize("NFKC", unicodedata.normalize("NFD", name).casefold()))
    return " ".join(name.split())


def for_kind(text: str, kind: Kind | None) -> str:
    """Return a text with `{}` in the place of a name, for a name of some kind: a thing is asked about by "What is {}?".

    Every "Who is {}?" is replaced by it; nothing else changes, and nothing for other kinds.
    """
    return text.replace("Who is {}?", "What is {}?") if kind == "thing" else text


def holds_name(text: str, name: str) -> bool:
    """Return whether a text contains a name, whichever Unicode normalisation form either has."""
    return name in text or unicodedata.normalize("NFC", name) in unicodedata.normalize("NFC", text)


def with_name(text: str, name: str, other: str) -> str:
    """Return a text with a name that it contains replaced by another; see `holds_name`."""
    if name in text:
        return text.replace(name, other)
    return unicodedata.normalize("NFC", text).replace(unicodedata.normalize("NFC", name), other)


def _shown(text: str) -> str:
    """Quote a text for a message: at most 60 characters, on one line, without invisible characters."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _kind(value: object) -> str:
    """Return the name of the type of a value of a file."""
    kind = type(value).__name__
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(kind, kind)
