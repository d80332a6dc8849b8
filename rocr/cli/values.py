"""Types of arguments and options: they convert a text to a value, or say what is wrong with it."""

from __future__ import annotations

import math
from typing import Any

import click
from click.shell_completion import CompletionItem

from rocr.errors import InputError

SAVED = ("model", "gguf", "lora", "gguf-lora", "edit", "originals")
GGUF_KINDS = ("f32", "f16", "bf16", "q8_0")
MAX_LAYER = 9_999


class PathType(click.types.StringParamType):
    """A path as text, which a shell completes.

    Args:
        kind: "file" or "dir".
    """

    def __init__(self, kind: str) -> None:
        self.name = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave the completion to the shell."""
        return [CompletionItem(incomplete, type=self.name)]


class Number(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A number of a kind, from `least` to `most`; NaN is refused."""

    name = "n"

    def __init__(self, least: int, most: int, kind: type[int] | type[float] = int) -> None:
        self.least, self.most, self.kind = least, most, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """Convert a text to a number."""
        try:
            found: int | float = self.kind(value)
        except ValueError:
            found = math.nan
        if not self.least <= found <= self.most:
            noun = "a whole number" if self.kind is int else "a number"
            self.fail(f"{short(value)} is not {noun} from {self.least:,} to {self.most:,}.", param, ctx)
        return found


FILE, DIR = PathType("file"), PathType("dir")
COUNT = Number(1, 1_000_000)
THREADS = Number(1, 1024)
TOKENS = Number(1, 10**12)
SEED = Number(0, 2**63 - 1)
SHARE = Number(0, 1, float)


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
    if "model" in parts and "gguf" in parts:
        raise InputError(
            "--save takes model or gguf, not both: the edited weights of a GGUF file are rounded to its types, and the "
            "edit file undoes one of the two."
        )
    if "originals" in parts and not {"model", "gguf"} & set(parts):
        raise InputError("--save originals keeps the first bytes of a model that is written: add model or gguf.")
    return parts


def short(text: object) -> str:
    """A value as a message shows it: quoted, of at most 60 characters."""
    shown = str(text)
    return repr(shown if len(shown) <= 60 else f"{shown[:57]}...")
