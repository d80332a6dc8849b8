"""`--config FILE`: options of a command in a TOML file, and the file that an output gets to repeat its run."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from rocr import __version__
from rocr.cli.parsing import Command, spelled_words
from rocr.cli.values import Number, short
from rocr.errors import InputError

MAX_BYTES = 2**20
DIGEST = "concepts_sha256"
"""The key of the digest that the list of concepts had in the run that wrote the file."""
LISTS = ("layers", "save")
"""Options whose value on the command line is a list in one word; in a file an array is allowed too."""
NOT_IN_A_FILE = ("config", "json", "debug")
NOT_WRITTEN = (*NOT_IN_A_FILE, "out", "overwrite", "dry_run", "quiet", "verbose", "keep_statistics")
"""Options that say where a run writes and what it shows, not what it makes."""
ALTERNATIVES = (
    ("concepts", "concept"),
    ("statistics", "text"),
    ("statistics", "tokens"),
    ("statistics", "keep_statistics"),
    ("partial", "whole"),
    ("keep_zeros", "fill_zeros"),
    ("template_weight", "held_weight"),
    ("token_schedule", "reach"),
    *(("no_chat", name) for name in ("system", "template_variable", "date")),
)
"""Options that exclude each other: one on the command line takes the place of the other in the file."""


@dataclass(frozen=True)
class ConfigFile:
    """A file of options.

    Attributes:
        path: the file.
        values: values of parameters by name, as click converts them.
        concepts_sha256: the recorded digest of the list of concepts; None without one.
    """

    path: str
    values: dict[str, Any]
    concepts_sha256: str | None


class ConfiguredCommand(Command):
    """A command whose options a file may give, under those of the command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the name of the command, and read the file of --config before."""
        words = spelled_words(args, ctx)
        given = _given(words, self, ctx)
        places = [word.partition("=")[2] for word in words if word.startswith("--config=")]
        if places and not ctx.resilient_parsing:
            file = read_config(places[-1], self, ctx)
            replaced = {name for pair in ALTERNATIVES for name, other in (pair, pair[::-1]) if other in given}
            values = {name: value for name, value in file.values.items() if name not in replaced}
            ctx.default_map = values
            ctx.meta[__name__] = ConfigFile(
                file.path, values, None if {"concepts", "concept"} & given else file.concepts_sha256
            )
        return super().parse_args(ctx, args)


def read_config(path: str, command: click.Command, context: click.Context) -> ConfigFile:
    """Read options of a command from a TOML file.

    Args:
        path: the file.
        command: the command.
        context: of the command.

    Raises:
        InputError: the file cannot be read, is not TOML, or has a key that is not an option, or a value of a wrong
            type or outside its bounds.
    """
    from rocr.io.bounded import read_bounded
    from rocr.io.toml import read_toml

    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8-sig")
        found = read_toml(text)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8.") from None
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {str(error)[:200]}.") from None
    known = {parameter.name: parameter for parameter in command.params if parameter.name not in NOT_IN_A_FILE}
    values: dict[str, Any] = {}
    digest = None
    for key, value in found.items():
        place, name = f"{path}, {_line_of(key, text)}", key.replace("-", "_")
        if name == DIGEST:
            if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
                raise InputError(f"{place}: {DIGEST} must be a sha256 of 64 hexadecimal digits, not {_shown(value)}.")
            digest = value
            continue
        parameter = known.get(name)
        if parameter is None:
            raise InputError(f"{place}: {_unknown(key, [*map(str, known), DIGEST])}")
        if name in values:
            raise InputError(f"{place}: {key} is given twice, with - and with _.")
        values[name] = _checked(parameter, value, f"{place}: {key}", context)
    return ConfigFile(path, values, digest)


def config_of(context: click.Context) -> ConfigFile | None:
    """The file of --config, less what the command line replaces; None without one."""
    found: ConfigFile | None = context.meta.get(__name__)
    return found


def settings_text(context: click.Context, concepts_sha256: str | None) -> str:
    """The options of a run as a file for --config, which makes the same edit.

    Args:
        context: of the command.
        concepts_sha256: the digest of the list of concepts; None if there is no list.

    Raises:
        ValueError: a text, such as a path, is not UTF-8.
    """
    from rocr.io.toml import write_toml

    sources = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    values = {
        str(parameter.name): _plain(context.params[str(parameter.name)])
        for parameter in context.command.params
        if parameter.name not in NOT_WRITTEN and context.get_parameter_source(str(parameter.name)) in sources
    }
    if concepts_sha256 is not None:
        values[DIGEST] = concepts_sha256
    return f"# rocr {__version__}: rocr {context.info_name} --config THIS_FILE --out DIR\n{write_toml(values)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _given(words: Sequence[str], command: click.Command, context: click.Context) -> set[str]:
    """Names of the parameters that the words of a command line give; see `spelled_words`."""
    end = words.index("--")
    parameters = command.get_params(context)
    options = {name: parameter.name for parameter in parameters for name in parameter.opts}
    positional = [parameter.name for parameter in parameters if isinstance(parameter, click.Argument)]
    found = [options.get(word.partition("=")[0]) for word in words[:end]]
    return {name for name in (*found, *positional[: len(words) - end - 1]) if name is not None}


def _checked(parameter: click.Parameter, value: Any, place: str, context: click.Context) -> Any:
    """A value of the file in the form that click converts.

    Raises:
        InputError: its type is wrong, or it is not a value of the option.
    """
    expected, fits = _kind(parameter, value)
    if not fits:
        raise InputError(f"{place} must be {expected}, not {_shown(value)}.")
    if parameter.name in LISTS and not isinstance(value, str):
        value = ",".join(map(str, value))
    try:
        parameter.type_cast_value(context, value)
    except click.BadParameter as error:
        raise InputError(f"{place}: {' '.join(error.message.split())}") from None
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return value


def _kind(parameter: click.Parameter, value: Any) -> tuple[str, bool]:
    """What a value of an option must be, and whether a value is that."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "true or false", isinstance(value, bool)
    if parameter.name == "layers":
        return 'an array such as [4, 5] or a text such as "4-6"', isinstance(value, str) or _all(value, int)
    if parameter.name == "save":
        return 'an array such as ["model", "edit"] or a text', isinstance(value, str) or _all(value, str)
    if parameter.multiple:
        return 'an array of texts such as ["a", "b"]', _all(value, str)
    if isinstance(parameter.type, Number) and parameter.type.kind is int:
        return "a whole number", is_number and isinstance(value, int)
    if isinstance(parameter.type, Number) or parameter.type is click.FLOAT:
        return "a number", is_number
    return "a text in quotes", isinstance(value, str)


def _all(value: Any, kind: type) -> bool:
    """Whether a value is a list of one kind, which has an element."""
    return isinstance(value, list) and bool(value) and all(type(each) is kind for each in value)


def _line_of(key: str, text: str) -> str:
    """The line of a key, as a part of a message."""
    forms = "|".join(re.escape(form) for form in (key, f'"{key}"', f"'{key}'"))
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(rf"\s*\[*\s*(?:{forms})\s*[=.\]]", line):
            return f"line {number}"
    return f"key {short(key)}"


def _unknown(key: str, known: Iterable[str]) -> str:
    name = key.replace("-", "_")
    if name in NOT_IN_A_FILE:
        return f"{key} is given on the command line only."
    nearest = difflib.get_close_matches(name, known, 1)
    return f"{short(key)} is not an option.{f' Did you mean {nearest[0]}?' if nearest else ''}"


def _shown(value: Any) -> str:
    kinds: Mapping[type, str] = {dict: "a table", list: "an array", bool: "true or false", str: "a text"}
    return f"{short(value)} ({kinds.get(type(value), type(value).__name__)})"
