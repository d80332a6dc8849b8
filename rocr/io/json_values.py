"""Parse untrusted JSON, check the types of its values, and write JSON in any encoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MAX_INTEGER = 2**63 - 1


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: The text is not JSON or not UTF-8, has a field twice, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_fields)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_text(value: Any, indent: int, encoding: str = "utf-8") -> str:
    """Return a value as JSON that can be encoded: with escapes if the encoding lacks one of the characters.

    File names that are not UTF-8, for example, hold characters that UTF-8 cannot encode.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def text_of(value: object, what: str) -> str:
    """Return the value; raise TypeError unless it is a string."""
    return str(_of_kind(value, what, "a text", lambda value: isinstance(value, str)))


def flag_of(value: object, what: str) -> bool:
    """Return the value; raise TypeError unless it is true or false."""
    return bool(_of_kind(value, what, "true or false", lambda value: isinstance(value, bool)))


def whole_number_of(value: object, what: str, least: int = 0) -> int:
    """Return the value; raise TypeError unless it is a whole number from `least` to 2**63 - 1."""
    found: int = _of_kind(value, what, f"a whole number of at least {least}", lambda value: _is_whole(value, least))
    return found


def list_of(value: object, what: str) -> list[Any]:
    """Return the value; raise TypeError unless it is a list."""
    found: list[Any] = _of_kind(value, what, "a list", lambda value: isinstance(value, list))
    return found


def object_of(value: object, what: str) -> dict[str, Any]:
    """Return the value; raise TypeError unless it is an object."""
    found: dict[str, Any] = _of_kind(value, what, "an object", lambda value: isinstance(value, dict))
    return found


def numbers_of(value: object, what: str, length: int) -> list[float]:
    """Return the value; raise TypeError unless it is a list of `length` numbers."""
    values = list_of(value, what)
    if len(values) != length or not all(isinstance(v, float) or _is_whole(v, -MAX_INTEGER) for v in values):
        raise TypeError(f"{what} must be a list of {length} numbers")
    return values


def _of_kind(value: object, what: str, kind: str, is_right: Callable[[Any], bool]) -> Any:
    if not is_right(value):
        raise TypeError(f"{what} must be {kind}, not {repr(value)[:60]}")
    return value


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_INTEGER


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:60]!r} occurs twice")
    return fields
