"""Check the types of arguments of public functions: an InputError names the argument and says what to pass."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from rocr.errors import InputError

SHOWN_CHARACTERS = 60
TEXTS = "a list of texts"
NAMES = "a list of names"
LAYERS = "a list of layer numbers"


def check_kind(name: str, value: object, kind: type | tuple[type, ...], expected: str, optional: bool = False) -> None:
    """Raise InputError unless an argument is an instance of a type.

    Args:
        name: The name of the argument.
        value: Its value.
        kind: The type, or one of several.
        expected: What to pass, such as "a rocr.EditConfig".
        optional: Whether None is allowed too.
    """
    if not (isinstance(value, kind) or (optional and value is None)):
        raise _wrong(name, value, expected)


def check_list(name: str, value: object, kind: type, expected: str, optional: bool = False, advice: str = "") -> None:
    """Raise InputError unless an argument is an iterable of instances of a type, and not a single text.

    The elements of an iterator, which can be read only once, are not checked.

    Args:
        name: The name of the argument.
        value: Its value.
        kind: The type of its elements.
        expected: What to pass, such as "a list of texts".
        optional: Whether None is allowed too.
        advice: A sentence that says what to do with a single text; empty: put it into a list.
    """
    if value is None and optional:
        return
    if isinstance(value, str):
        raise _wrong(name, value, f"{expected}, not a single text", advice or f"Pass {name}=[...] with it in the list.")
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(name, value, expected)
    if iter(value) is not value:
        for index, element in enumerate(value):
            if not isinstance(element, kind):
                raise _wrong(f"{name}[{index}]", element, f"one of {expected}")


def check_layers(name: str, value: object) -> None:
    """Raise InputError unless an argument is None or an iterable of layer numbers."""
    if value is None:
        return
    expected = f"{LAYERS}, such as [4, 5]"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(name, value, expected)
    for layer in value:
        if not hasattr(layer, "__index__") or isinstance(layer, bool):
            raise _wrong(name, value, expected)


def check_reader(model: object, tokenizer: object, progress: object) -> None:
    """Raise InputError unless the arguments `model`, `tokenizer` and `progress` can be called."""
    if not callable(model):
        raise _wrong("model", model, "a loaded model (transformers.AutoModelForCausalLM.from_pretrained)")
    if not callable(tokenizer):
        raise _wrong("tokenizer", tokenizer, "the tokenizer of the model (transformers.AutoTokenizer.from_pretrained)")
    if not callable(progress):
        expected = "a function of one argument, a rocr.Progress"
        raise _wrong("progress", progress, expected, "Leave it out to show no progress.")


def check_path(name: str, value: object) -> None:
    """Raise InputError unless an argument is a path."""
    check_kind(name, value, (str, os.PathLike), "a path")


def _wrong(name: str, value: object, expected: str, advice: str = "") -> InputError:
    """Return the error for an argument of a wrong type, with the beginning of its value."""
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}…"
    kind = "" if value is None else f" ({type(value).__name__})"
    # A single text is described in `expected` already.
    found = f": {shown}" if ", not " in expected else f", not {shown}{kind}"
    return InputError(f"{name} must be {expected}{found}.{' ' if advice else ''}{advice}")
