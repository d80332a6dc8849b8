"""Make untrusted text safe to show: control and invisible characters are written as their codes."""

from __future__ import annotations

import unicodedata

from rocr.io.spelling import hidden_characters

MAX_SHOWN = 20_000
"""Limit of the characters of one text; a message of fifty errors with long names is shorter."""


def visible(text: str) -> str:
    r"""Return a text in which control and invisible characters are written as their codes, such as \u200b.

    Joiners and variation selectors that belong to the spelling of a word are kept.
    """
    if len(text) > MAX_SHOWN:
        text = text[:MAX_SHOWN] + "…"
    unseen = {index for index, _ in hidden_characters(text)}
    return "".join(
        f"\\u{ord(character):04x}"
        if character not in "\n\t" and (index in unseen or unicodedata.category(character) in ("Co", "Cn"))
        else character
        for index, character in enumerate(text)
    )
