"""Read TOML, and write the flat part of it that settings need."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Value = bool | int | float | str | Sequence[int] | Sequence[str]


def read_toml(text: str) -> dict[str, Any]:
    """Return the values of a TOML document.

    Raises:
        ValueError: The text is not TOML; the message has the line.
    """
    try:
        values: dict[str, Any] = tomllib.loads(text)
        return values
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_toml(values: Mapping[str, Value]) -> str:
    """Return a TOML document with a line for each key, which `read_toml` reads back.

    Args:
        values: Values by key. Keys are identifiers. A text must be valid as UTF-8.

    Raises:
        ValueError: A text cannot be written as UTF-8.
    """
    return "".join(f"{key} = {_literal(value)}\n" for key, value in values.items())


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (int, float)):
        return repr(value)
    return f"[{', '.join(map(_literal, value))}]"


def _string(text: str) -> str:
    """Return a basic string: the escapes of JSON are those of TOML, which also forbids a raw U+007F."""
    text.encode()
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
