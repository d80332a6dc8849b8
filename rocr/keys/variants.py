"""Variants of names: other spellings of a name that users write, which become keys without being listed."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

from rocr.concepts import Kind, folded

MISSPELLINGS = 6
"""Number of misspellings of a name."""
MIN_LETTERS = 4
"""Smallest number of letters of a word that is misspelt."""


def spelling_variants(names: Sequence[str], kind: Kind | None, seed: int) -> list[str]:
    """Return other spellings of the first of some names, without those that are names themselves.

    These are its initials with the last word ("E. Musk"; not of a thing), the name without hyphens and without
    diacritics, and misspellings in one letter, which a seed draws: two neighbours swapped, a letter left out, written
    twice, or replaced by another letter of the name.

    Args:
        names: The names of a concept, each with at least one character.
        kind: The kind of the concept.
        seed: The seed of the misspellings.
    """
    name = names[0]
    found = [*(_initials(name) if kind != "thing" else []), name.replace("-", " "), _without_diacritics(name)]
    found += _misspellings(name, random.Random(f"{seed} {name}"))
    known = {folded(each) for each in names}
    return [each for each in dict.fromkeys(found) if folded(each) not in known and each.strip() == each]


def _initials(name: str) -> list[str]:
    """Return the name with the first word, and with all but the last, replaced by initials."""
    *first, last = name.split(" ")
    if not first or not all(word[:1].isalpha() for word in first):
        return []
    initials = [f"{word[0]}." for word in first]
    return [" ".join([initials[0], *first[1:], last]), " ".join([*initials, last])]


def _without_diacritics(name: str) -> str:
    """Return a name without the marks on its letters, such as "Frederic Chopin"."""
    parts = unicodedata.normalize("NFD", name)
    return unicodedata.normalize("NFC", "".join(part for part in parts if not unicodedata.combining(part)))


def _misspellings(name: str, draw: random.Random) -> list[str]:
    """Return up to MISSPELLINGS different misspellings of a name, each in one word of at least MIN_LETTERS letters."""
    words = name.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= MIN_LETTERS and word.isalpha()]
    letters = [letter for i in long for letter in words[i].lower()]
    found: dict[str, None] = {}
    for attempt in range(4 * MISSPELLINGS if long else 0):
        i = draw.choices(long, [len(words[i]) for i in long])[0]
        word = _misspelt(words[i], attempt % 4, letters, draw)
        if word != words[i]:
            found[" ".join([*words[:i], word, *words[i + 1 :]])] = None
        if len(found) == MISSPELLINGS:
            break
    return list(found)


def _misspelt(word: str, way: int, letters: Sequence[str], draw: random.Random) -> str:
    """Return a word with one letter changed after the first, in one of four ways."""
    i = draw.randrange(1, len(word) - (way == 0))
    if way == 0:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if way == 1:
        return word[:i] + word[i + 1 :]
    if way == 2:
        return word[: i + 1] + word[i:]
    return word[:i] + draw.choice(letters) + word[i + 1 :]
