"""Calls of a tokenizer: what it raises becomes a sentence, and its opening tokens are never doubled."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rocr.errors import InputError
from rocr.io.boundary import calling

PART = "\ufffd"
"""Stands in a token's text for a character of which the token holds some bytes only."""
_SPACE_MARK = "\u2581"  # of SentencePiece
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of SentencePiece, for characters that it has no token for


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of texts, without what the tokenizer puts before or behind a text.

    Raises:
        InputError: the tokenizer fails.
    """
    with calling_tokenizer(tokenizer):
        # Not verbose: a text may well be longer than the model's context.
        found: list[list[int]] = tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    return found


def tokenize_prompt(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text for a model to go on from: with the tokenizer's opening, never doubled.

    Raises:
        InputError: the tokenizer fails.
    """
    return opening_tokens(tokenizer, text) + tokenize(tokenizer, [text])[0]


def tokenize_with_offsets(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """For each text its token ids, and for each of them the range of characters that it covers.

    Raises:
        InputError: the tokenizer fails, or reports no offsets.
    """
    check_tokenizer(tokenizer)
    with calling_tokenizer(tokenizer):
        encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def opening_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens that the tokenizer puts before a text (its BOS, if it adds one), unless the text has them already.

    A chat template usually writes the BOS itself; adding it again would make it double.

    Raises:
        InputError: the tokenizer fails.
    """
    with calling_tokenizer(tokenizer):
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        special = tokenizer("a", add_special_tokens=True)["input_ids"]
        opening: list[int] = special[: _find(special, plain)]
        written = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [] if written[: len(opening)] == opening else opening


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot say which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} reports no character offsets, which rocr needs to find a name's tokens; "
            "load the tokenizer with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )


def calling_tokenizer(tokenizer: Any) -> AbstractContextManager[None]:
    """The boundary to a tokenizer; see `rocr.io.boundary.calling`."""
    return calling(f"The tokenizer ({type(tokenizer).__name__})")


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """A function that gives a token's own text, with `PART` for what is only some bytes of a character.

    Decoding a single token does not do: some decoders strip its space, and some tokenizers have none.
    """
    with calling_tokenizer(tokenizer):
        is_byte_level = any(
            b'"ByteLevel"' in part.__getstate__()
            for part in (tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.decoder)
            if part is not None
        )

    @functools.cache
    def text_of(token: int) -> str:
        with calling_tokenizer(tokenizer):
            piece = str(tokenizer.convert_ids_to_tokens(token) or PART)
        if is_byte_level and all(character in _bytes_of_characters() for character in piece):
            return bytes(_bytes_of_characters()[character] for character in piece).decode("utf-8", "replace")
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte[1], 16)]).decode("utf-8", "replace")
        return piece.replace(_SPACE_MARK, " ")

    return text_of


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The bytes that the characters of a byte-level token stand for: those that are no letter are moved up by 256."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _find(sequence: Sequence[int], part: Sequence[int]) -> int:
    for i in range(len(sequence) - len(part) + 1):
        if list(sequence[i : i + len(part)]) == list(part):
            return i
    return 0
