"""Call a tokenizer: errors become an InputError, and opening tokens such as BOS are never doubled."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rocr.errors import InputError
from rocr.io.boundary import calling

PART = "\ufffd"
"""Replaces a character in a token's text of which the token holds only some bytes."""
_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece writes characters without a token as bytes


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, without special tokens before or after a text.

    Raises:
        InputError: The tokenizer fails.
    """
    with calling_tokenizer(tokenizer):
        # verbose=False: no warning if a text is longer than the model's context.
        found: list[list[int]] = tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    return found


def tokenize_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that a model continues: with the tokenizer's opening tokens, never doubled.

    Raises:
        InputError: The tokenizer fails.
    """
    return opening_tokens(tokenizer, text) + tokenize(tokenizer, [text])[0]


def tokenize_with_offsets(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return for each text its token ids and the range of characters that each token covers.

    Raises:
        InputError: The tokenizer fails, or reports no offsets.
    """
    check_tokenizer(tokenizer)
    with calling_tokenizer(tokenizer):
        encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def opening_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens that the tokenizer puts before a text, such as BOS; none if the text already has them.

    A chat template usually writes the BOS token itself, which must not be added again.

    Raises:
        InputError: The tokenizer fails.
    """
    with calling_tokenizer(tokenizer):
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        special = tokenizer("a", add_special_tokens=True)["input_ids"]
        opening: list[int] = special[: _find(special, plain)]
        written = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [] if written[: len(opening)] == opening else opening


def closing_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts after a text, such as EOS.

    Raises:
        InputError: The tokenizer fails.
    """
    with calling_tokenizer(tokenizer):
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        special: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    end = _find(special, plain) + len(plain)
    return special[end:] if special[end - len(plain) : end] == plain else []


def check_tokenizer(tokenizer: Any) -> None:
    """Raise InputError if a tokenizer does not report which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} reports no character offsets, which rocr needs to find the tokens of a name. "
            "Load the tokenizer with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )


def calling_tokenizer(tokenizer: Any) -> AbstractContextManager[None]:
    """Turn exceptions of a tokenizer into an InputError; see `rocr.io.boundary.calling`."""
    return calling(f"The tokenizer ({type(tokenizer).__name__})")


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """Return a function from a token id to the token's text, with `PART` for an incomplete character.

    Decoding a single token does not work: some decoders strip its space, and some tokenizers have no decoder.
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
    """Map the characters of byte-level tokens to bytes: unprintable bytes are written as characters from 256."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _find(sequence: Sequence[int], part: Sequence[int]) -> int:
    for i in range(len(sequence) - len(part) + 1):
        if list(sequence[i : i + len(part)]) == list(part):
            return i
    return 0
