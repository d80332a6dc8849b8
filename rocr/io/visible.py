"""Texts of others as they can be shown: what would steer a terminal, or hide in a page, is written as its code."""

from __future__ import annotations

import unicodedata

from rocr.io.spelling import hidden

MAX_SHOWN = 20_000
"""Characters of one text: fifty errors with names of the allowed length are fewer."""


def visible(text: str) -> str:
    """The text with characters that would steer the terminal, or hide in it, written as their codes.

    Joiners and selectors that belong to a word's spelling stay.
    """
    if len(text) > MAX_SHOWN:
        text = text[:MAX_SHOWN] + "…"
    unseen = {index for index, _ in hidden(text)}
    return "".join(
        f"\\u{ord(character):04x}"
        if character not in "\n\t" and (index in unseen or unicodedata.category(character) in ("Co", "Cn"))
        else character
        for index, character in enumerate(text)
    )
