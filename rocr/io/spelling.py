"""Find invisible characters, except joiners and variation selectors that belong to the spelling of a word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_INVISIBLE_CATEGORIES = {
    "Cc": "a control character",
    "Cf": "an invisible character",  # includes zero-width and bidirectional characters
    "Cs": "half of a surrogate pair",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
# The Unicode property Default_Ignorable_Code_Point.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_UNUSUAL = re.compile("[^ -~]")
_NON_JOINER, _JOINER = "\u200c", "\u200d"
# Scripts that use joiners because they join or stack letters, as the Unicode names of their characters begin.
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
"""The combining class of signs that remove the vowel of a consonant."""


def hidden_characters(text: str) -> Iterator[tuple[int, str]]:
    """Find the characters of a text that are not visible and do not belong to its spelling.

    These characters belong to the spelling: zero-width joiners and non-joiners between letters of scripts that use
    them (Persian, the scripts of India) and after a virama (Malayalam's chillus); joiners between emoji; variation
    selectors after ideographs and emoji, with the numbers that are in use there; Mongolian's own selectors.

    Yields:
        The index of each hidden character and a description of it.
    """
    for found in _UNUSUAL.finditer(text):
        index, character = found.start(), found[0]
        kind = _INVISIBLE_CATEGORIES.get(unicodedata.category(character))
        if kind is None and _IGNORABLE.match(character):
            kind = "an invisible character"  # in the category of letters or marks
        if kind is not None and not _is_spelling(text, index):
            yield index, kind


def without_ignorable(text: str) -> str:
    """Return a text without Unicode's default ignorable code points, such as joiners and variation selectors."""
    return text if text.isascii() else _IGNORABLE.sub("", text)


def has_visible_character(text: str) -> bool:
    """Return whether a text holds anything but white space and invisible characters."""
    return bool(without_ignorable(text).strip())


def has_word_character(text: str) -> bool:
    """Return whether a text holds a letter, a digit or a mark, and not only punctuation, symbols, space or joiners."""
    return any(unicodedata.category(character)[0] in "LNM" for character in without_ignorable(text))


def _is_spelling(text: str, index: int) -> bool:
    """Return whether the invisible character at an index belongs to the spelling, by the characters around it."""
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
    # One side is enough: Persian adds its endings to words in Latin letters.
    return letters and (_is_letter_of(before, _JOINING_SCRIPTS) or _is_letter_of(after, _JOINING_SCRIPTS))


def _selects(before: str, number: int, after: str) -> bool:
    """Return whether variation selector `number` is in use with the character before it."""
    if not before:
        return False
    if unicodedata.name(before, "").startswith(_IDEOGRAPHS):
        return number <= 3 or number >= 17
    if number in (15, 16):
        return after == _KEYCAP if before in _KEYCAP_BASES else _is_emoji(before)
    return number == 1 and _is_letter_of(before, _FIRST_SELECTOR_SCRIPTS)


def _is_emoji(character: str) -> bool:
    """Return whether a character is likely an emoji: Python has no table of the property Emoji."""
    return unicodedata.category(character) == "So" or character in _OTHER_EMOJI


def _is_letter(character: str) -> bool:
    """Return whether there is a character, and it is a visible letter or mark."""
    return bool(character) and unicodedata.category(character)[0] in "LM" and not _IGNORABLE.match(character)


def _is_letter_of(character: str, scripts: tuple[str, ...]) -> bool:
    return _is_letter(character) and unicodedata.name(character, "").startswith(scripts)
