"""Variants of names: other spellings of a name that users write, which become keys without being listed."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Sequence

from rocr.concepts import Concept, Kind, folded
from rocr.config import EditConfig

MISSPELLINGS = 6
"""Number of misspellings of a name."""
MIN_LETTERS = 4
"""Smallest number of letters of a word that is misspelt."""

OFTEN_UNMARKED = ("LATIN", "GREEK", "ARABIC", "HEBREW", "CYRILLIC CAPITAL LETTER IE", "CYRILLIC SMALL LETTER IE")
"""Letters whose diacritics are often left out, as their names begin in Unicode."""


def variants_of(
    concepts: Sequence[Concept], seed: int, base: Sequence[Concept] = (), kept: Iterable[str] = ()
) -> list[list[str]]:
    """Return for each of some concepts the spelling variants of its name that stand for it alone.

    A variant that is a name or the redirect of any of the concepts, or a name that is to stay as it is, is left out;
    so is one of several concepts that have different redirects, such as "J. Smith" of John and Jane Smith.

    Args:
        concepts: The concepts.
        seed: The seed of the misspellings.
        base: Concepts that are unlearned already.
        kept: Names that are to stay as they are.
    """
    everyone = [*base, *concepts]
    known = {folded(name) for each in everyone for name in (*each.names, each.redirect)} | set(map(folded, kept))
    found = [{name: folded(name) for name in spelling_variants(each.names, each.kind, seed)} for each in everyone]
    redirects: dict[str, set[str]] = {}
    for concept, variants in zip(everyone, found, strict=True):
        for form in variants.values():
            redirects.setdefault(form, set()).add(folded(concept.redirect))
    return [
        [name for name, form in variants.items() if form not in known and len(redirects[form]) == 1]
        for variants in found[len(base) :]
    ]


def same_variants_beside(concepts: Sequence[Concept], others: Sequence[Concept], config: EditConfig) -> bool:
    """Return whether some concepts have the same variants, if any, beside others as without them; see `variants_of`."""
    if config.variants == "none":
        return True
    return variants_of(concepts, config.seed) == variants_of([*concepts, *others], config.seed)[: len(concepts)]


def spelling_variants(names: Sequence[str], kind: Kind | None, seed: int) -> list[str]:
    """Return other spellings of the first of some names, without those that are names themselves.

    These are its initials with the last word ("E. Musk"; not of a thing), the name without hyphens and without
    diacritics, and misspellings in one letter, which a seed draws: two neighbours swapped, a letter left out, written
    twice, or replaced by another letter of the name. Scripts without upper case have no initials. Abbreviations have no
    misspellings: one letter off, "NASA" is the NSA.

    Args:
        names: The names of a concept, each with at least one character.
        kind: The kind of the concept.
        seed: The seed of the misspellings.
    """
    name = names[0]
    found = [
        *(_initials(name) if kind != "thing" else []),
        " ".join(name.replace("-", " ").split()),
        _without_diacritics(name),
    ]
    found += _misspellings(name, random.Random(f"{seed} {name}"))
    known = {folded(each) for each in names}
    return [each for each in dict.fromkeys(found) if each and folded(each) not in known]


def _initials(name: str) -> list[str]:
    """Return the name with the first word, and with all but the last, replaced by initials."""
    *first, last = name.split(" ")
    if not first or not all(word[0].lower() != word[0].upper() for word in first):
        return []
    initials = [f"{word[0]}." for word in first]
    return [" ".join([initials[0], *first[1:], last]), " ".join([*initials, last])]


def _without_diacritics(name: str) -> str:
    """Return a name without the marks that people leave out, such as "Frederic Chopin".

    In other scripts a mark makes another letter, such as that of й, of Japanese ガ, or the virama of Devanagari.
    """
    kept, letter = [], ""
    for part in unicodedata.normalize("NFD", name):
        if not unicodedata.combining(part):
            letter = part
        elif unicodedata.name(letter, "").startswith(OFTEN_UNMARKED):
            continue
        kept.append(part)
    return unicodedata.normalize("NFC", "".join(kept))


def _misspellings(name: str, draw: random.Random) -> list[str]:
    """Return up to MISSPELLINGS different misspellings of a name, each in one word of at least MIN_LETTERS letters."""
    words = name.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= MIN_LETTERS and word.isalpha() and not word.isupper()]
    letters = [letter for i in long for letter in words[i].lower() if letter.isalpha()]
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
