"""Which invisible characters belong to a spelling: joiners and selectors, in the scripts that use them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_REFUSED_CATEGORIES = {
    "Cc": "a control character",
    "Cf": "an invisible character",  # zero-width and bidirectional ones among them
    "Cs": "half of a surrogate pair",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
# Unicode's property Default_Ignorable_Code_Point.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_UNUSUAL = re.compile("[^ -~]")
_NON_JOINER, _JOINER = "\u200c", "\u200d"
# Scripts that write with joiners, as the names of their characters begin: those that join letters or stack them.
_JOINING_SCRIPTS = tuple(
    f"{script} "
    for script in (
        "ARABIC", "SYRIAC", "MANDAIC", "MONGOLIAN", "NKO", "PHAGS-PA", "MANICHAEAN", "PSALTER PAHLAVI",
        "HANIFI ROHINGYA", "SOGDIAN", "OLD SOGDIAN", "OLD UYGHUR", "CHORASMIAN", "ADLAM", "DEVANAGARI", "BENGALI",
        "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM", "SINHALA", "TIBETAN", "MYANMAR",
        "KHMER", "BALINESE", "JAVANESE", "SUNDANESE", "CHAKMA", "MEETEI MAYEK", "LIMBU", "NEWA", "TIRHUTA", "GRANTHA",
        "SHARADA", "KAITHI", "MODI", "SAURASHTRA", "BRAHMI",
    )
)  # fmt: skip
_FIRST_SELECTOR_SCRIPTS = ("MYANMAR ", "PHAGS-PA ", "MANICHAEAN ")
_IDEOGRAPHS = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")
_KEYCAP, _KEYCAP_BASES = "\u20e3", "#*0123456789"
_OTHER_EMOJI = "\u203c\u2049\u2139\u2194\u25fb\u25fc\u25fd\u25fe\u2934\u2935\u3030"
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
_VIRAMA = 9
"""The combining class of signs that take a consonant's vowel away."""


def hidden(text: str) -> Iterator[tuple[int, str]]:
    """The characters of a text that a reader cannot see and that do not belong to its spelling.

    Part of the spelling are: the zero-width joiner and non-joiner between letters of scripts that write with them
    (Persian, the scripts of India), also behind a virama (Malayalam's chillus), and the joiner between emoji; a
    variation selector behind an ideograph or emoji, of the numbers that are in use there; Mongolian's own selectors.

    Yields:
        The index of each such character, and what it is, in words.
    """
    for found in _UNUSUAL.finditer(text):
        index, character = found.start(), found[0]
        kind = _REFUSED_CATEGORIES.get(unicodedata.category(character))
        if kind is None and _IGNORABLE.match(character):
            kind = "an invisible character"  # of the category of a letter or mark
        if kind is not None and not _is_spelling(text, index):
            yield index, kind


def without_ignorable(text: str) -> str:
    """A text without Unicode's default ignorable code points: joiners, selectors and all else that is not seen."""
    return text if text.isascii() else _IGNORABLE.sub("", text)


def is_seen(text: str) -> bool:
    """Whether a text holds anything but white space and characters that are not seen."""
    return bool(without_ignorable(text).strip())


def is_of_a_word(text: str) -> bool:
    """Whether a text holds a letter, a digit or a mark on one, and not punctuation, symbols, space or joiners alone."""
    return any(unicodedata.category(character)[0] in "LNM" for character in without_ignorable(text))


def _is_spelling(text: str, index: int) -> bool:
    """Whether the invisible character at an index belongs to the spelling, by those on either side of it."""
    before, character, after = text[max(index - 1, 0) : index], text[index], text[index + 1 : index + 2]
    if character in (_NON_JOINER, _JOINER):
        return _joins(before, character, after)
    if "\ufe00" <= character <= "\ufe0f":
        return _selects(before, ord(character) - 0xFE00 + 1, after)
    if "\U000e0100" <= character <= "\U000e01ef":
        return _selects(before, ord(character) - 0xE0100 + 17, after)
    if character in "\u180b\u180c\u180d\u180f":
        return _is_letter_of(before, ("MONGOLIAN ",))
    if character == "\u180e":
        return _is_letter_of(before, ("MONGOLIAN ",)) and _is_letter_of(after, ("MONGOLIAN ",))
    return False


def _joins(before: str, character: str, after: str) -> bool:
    if before and unicodedata.combining(before) == _VIRAMA:
        return True
    if character == _JOINER and after and _is_emoji(after):
        return bool(before) and (_is_emoji(before) or before in "\ufe0f" + _SKIN_TONES)
    letters = _is_letter(before) and _is_letter(after)
    # One side is enough: Persian hangs its endings on words in Latin letters.
    return letters and (_is_letter_of(before, _JOINING_SCRIPTS) or _is_letter_of(after, _JOINING_SCRIPTS))


def _selects(before: str, number: int, after: str) -> bool:
    """Whether variation selector `number` has a base that it is in use with."""
    if not before:
        return False
    if unicodedata.name(before, "").startswith(_IDEOGRAPHS):
        return number <= 3 or number >= 17
    if number in (15, 16):
        return after == _KEYCAP if before in _KEYCAP_BASES else _is_emoji(before)
    return number == 1 and _is_letter_of(before, _FIRST_SELECTOR_SCRIPTS)


def _is_emoji(character: str) -> bool:
    """Whether a character is, or may well be, an emoji: Python's tables do not say more."""
    return unicodedata.category(character) == "So" or character in _OTHER_EMOJI


def _is_letter(character: str) -> bool:
    """Whether there is a character, and it is a letter or a mark that is seen."""
    return bool(character) and unicodedata.category(character)[0] in "LM" and not _IGNORABLE.match(character)


def _is_letter_of(character: str, scripts: tuple[str, ...]) -> bool:
    return _is_letter(character) and unicodedata.name(character, "").startswith(scripts)
