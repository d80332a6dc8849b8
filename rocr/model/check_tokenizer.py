"""Check a tokenizer: its rules before it is loaded, and its token ids afterwards.

The rules must not make a text grow without bound, and every token must have a row in the embedding.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rocr.errors import InputError
from rocr.io.boundary import calling

MAX_GROWTH = 64
"""Limit of the factor by which the rules may lengthen a text; real tokenizers lengthen it 3 times at most."""
MAX_AFFIX = 1_000
"""Limit of the characters that a rule may put before or after a text, and of the tokens that a template may add."""
MAX_ID = 10_000_000
"""Limit of a token id: with larger ids, the tables of the tokenizer do not fit in memory."""
PROBES = ("The roses, 0123456789 of Ada Byron!", "naïve Æsop, Пушкин, 東京, القاهرة, 🌹\n\tdef f(x): return x**2")


def check_tokenizer_file(path: Path) -> None:
    """Raise InputError if a tokenizer.json can take memory without bound, or cuts texts at random.

    Raises:
        InputError: The file cannot be read or a rule exceeds its limit; the message names the rule and the limit.
    """
    if not path.is_file():
        return
    try:
        rules = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {str(error)[:200]}.") from None
    if not isinstance(rules, dict):
        raise InputError(f"{path} does not hold a JSON object.")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        _check_growth(f"{path}: its {part}", list(_nodes(rules.get(part))))
    _check_template(path, list(_nodes(rules.get("post_processor"))))
    model = rules.get("model")
    _check_model(path, model if isinstance(model, dict) else {})
    for token in rules.get("added_tokens") or ():
        _check_id(path, token.get("id") if isinstance(token, dict) else None)


def check_token_ids(tokenizer: Any, rows: int, name: str) -> None:
    """Raise InputError if a tokenizer has tokens without a row in the embedding.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: The number of rows of the embedding.
        name: The name of the model for the error message.

    Raises:
        InputError: A token has no row; the message names the largest id.
    """
    with calling(f"The tokenizer of {name}"):
        ids = [token for text in PROBES for token in tokenizer(text)["input_ids"]]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:  # without added tokens, which may have no row: they do not occur in plain text
            ids += backend.get_vocab(with_added_tokens=False).values()
    largest = max(ids, default=0)
    if largest >= rows:
        raise InputError(f"The tokenizer of {name} has the token {largest:,}, but the embedding has {rows:,} rows.")


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a tree of rules."""
    if isinstance(value, dict):
        yield value
        for below in value.values():
            yield from _nodes(below)
    elif isinstance(value, list):
        for below in value:
            yield from _nodes(below)


def _check_growth(what: str, nodes: list[dict[str, Any]]) -> None:
    growth = 1
    for node in nodes:
        if node.get("type") == "Replace":
            pattern = node.get("pattern")
            text = pattern.get("String") if isinstance(pattern, dict) else None
            # A regular expression counts as one character, since it may match one.
            growth *= max(1, -(-len(str(node.get("content", ""))) // max(1, len(str(text or "")))))
        elif node.get("type") == "Prepend" and len(str(node.get("prepend", ""))) > MAX_AFFIX:
            raise InputError(
                f"{what} puts {len(node['prepend']):,} characters before a text, and the limit is {MAX_AFFIX:,}."
            )
        elif node.get("type") == "Precompiled":
            growth *= max(1, _longest_replacement(str(node.get("precompiled_charsmap", ""))) // MAX_AFFIX)
        if growth > MAX_GROWTH:
            raise InputError(f"{what} can make a text more than {MAX_GROWTH} times longer; {MAX_GROWTH} is the limit.")


def _longest_replacement(charsmap: str) -> int:
    """Return the bytes of the longest replacement in a precompiled map, where a table of them follows the index."""
    try:
        data = base64.b64decode(charsmap)
    except ValueError:
        return 0  # the tokenizers library reports it
    return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")), default=0)


def _check_template(path: Path, nodes: list[dict[str, Any]]) -> None:
    ids = [token for node in nodes for token in (node["ids"] if isinstance(node.get("ids"), list) else ())]
    if len(nodes) > MAX_AFFIX or len(ids) > MAX_AFFIX:
        raise InputError(f"{path}: its post_processor puts more than {MAX_AFFIX:,} tokens, the limit, around a text.")
    for token in ids:
        _check_id(path, token)


def _check_model(path: Path, model: dict[str, Any]) -> None:
    if model.get("dropout"):
        raise InputError(f"{path} has a dropout of {str(model['dropout'])[:20]}: it would cut every text at random.")
    for name, value in model.items():
        if isinstance(value, str) and len(value) > MAX_AFFIX:
            raise InputError(f"{path}: its {name} has {len(value):,} characters, and the limit is {MAX_AFFIX:,}.")
    vocabulary = model.get("vocab")
    for token in vocabulary.values() if isinstance(vocabulary, dict) else ():
        _check_id(path, token)


def _check_id(path: Path, token: Any) -> None:
    if not isinstance(token, int) or not 0 <= token <= MAX_ID:
        raise InputError(f"{path} has the token id {repr(token)[:40]}, which must be a whole number up to {MAX_ID:,}.")
