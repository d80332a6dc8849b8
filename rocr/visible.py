"""Texts of others as they can be shown: what would steer a terminal, or hide in a page, is written as its code."""

from __future__ import annotations

import unicodedata

MAX_SHOWN = 20_000
"""Characters of one text: fifty errors with names of the allowed length are fewer."""


def visible(text: str) -> str:
    """The text with characters that would steer the terminal, or hide in it, written as their codes."""
    if len(text) > MAX_SHOWN:
        text = text[:MAX_SHOWN] + "…"
    return "".join(
        character if character in "\n\t" or unicodedata.category(character)[0] != "C" else f"\\u{ord(character):04x}"
        for character in text
    )
