"""Types of arguments: from the text that is given to a value, or a message that says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from rocr.errors import InputError

SAVED = ("model", "lora", "edit", "originals")
MAX_LAYER = 9_999


def number(kind: type[int] | type[float], least: int, most: int) -> Callable[[Any], Any]:
    """A type for numbers from `least` to `most`; NaN is refused."""
    noun = "a whole number" if kind is int else "a number"

    def parse(text: Any) -> int | float:
        try:
            value: int | float = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise click.BadParameter(f"{short(text)} is not {noun} from {least:,} to {most:,}.")
        return value

    return parse


COUNT = number(int, 1, 1_000_000)
TOKENS = number(int, 1, 10**12)
SEED = number(int, 0, 2**63 - 1)
SHARE = number(float, 0, 1)


def layer_list(text: str) -> tuple[int, ...]:
    """Layers such as "4,5,6" or "4-6"."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise click.BadParameter(f"{short(text)} is not a list of layers such as 4,5,6 or 4-6.")
        last = last or first
        if max(len(first), len(last)) > len(str(MAX_LAYER)) or int(first) > int(last):
            raise click.BadParameter(
                f"{short(text)} is not a list of layers from 0 to {MAX_LAYER:,}, each range in ascending order."
            )
        layers += range(int(first), int(last) + 1)
        if len(set(layers)) < len(layers):
            raise click.BadParameter(f"{short(text)} names a layer twice.")
    return tuple(layers)


def save_parts(text: str) -> tuple[str, ...]:
    """What to write, such as "model,edit".

    Raises:
        InputError: a part is unknown, or needs another one.
    """
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [part for part in parts if part not in SAVED]
    if unknown or not parts:
        raise InputError(f"--save takes {', '.join(SAVED)}, not {', '.join(unknown) or 'nothing'}.")
    if "originals" in parts and "model" not in parts:
        raise InputError("--save originals keeps the first bytes of a model that is written: add model.")
    return parts


def short(text: object) -> str:
    """What was given, as far as a message needs it."""
    shown = str(text)
    return repr(shown if len(shown) <= 60 else f"{shown[:57]}...")
