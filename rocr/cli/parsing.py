"""What rocr adds to click: options that take several words, abbreviated option names, and headings in the help."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import click

from rocr.cli.library_warnings import library_warnings

Decorator = Callable[[Any], Any]
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
SEVERAL = "NAME... and FILE... are words up to the next option. Put arguments before such an option, or after --."


class Arguments(SimpleNamespace):
    """Values of a command's parameters, by name.

    Attributes:
        context: click's context; resources entered into it are released when the command ends.
    """

    context: click.Context


class Option(click.Option):
    """An option with a heading, which may take several words.

    Args:
        names: such as `["--text"]`.
        group: heading of the help page that the option is listed under.
        several: whether the option takes all words up to the next option, as in `--text FILE FILE`.
        settings: of `click.Option`.
    """

    def __init__(self, names: list[str], group: str = "Options", several: bool = False, **settings: Any) -> None:
        super().__init__(names, **(settings | {"multiple": True} if several else settings))
        self.group, self.several = group, several

    def make_metavar(self, ctx: click.Context) -> str:
        """Such as "FILE", or "FILE..." for several words."""
        return super().make_metavar(ctx) + "..." * self.several


class Argument(click.Argument):
    """A positional argument with a help text, which click has from 8.5 on only."""

    group = "Arguments"

    def __init__(self, names: list[str], help: str, **settings: Any) -> None:
        super().__init__(names, **settings)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The line of the help page."""
        return self.make_metavar(ctx), self.help or ""


class Command(click.Command):
    """A command with --json and --debug; its function gets `Arguments` and the console, the context's object."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params += [
            Option(["--json"], is_flag=True, help="Write one JSON document to stdout; tables go to stderr."),
            Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]
        if any(getattr(parameter, "several", False) for parameter in self.params):
            self.epilog = SEVERAL

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the name of the command."""
        return super().parse_args(ctx, spelled_words(args, ctx))

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command's function and return its JSON document."""
        values = {name: value for name, value in ctx.params.items() if name not in ("json", "debug")}
        console = ctx.obj
        console.begin(ctx.params["debug"], ctx.params.get("quiet", False))
        assert self.callback is not None
        with library_warnings(console.warn, ctx.params.get("verbose", False)):
            return self.callback(Arguments(**values, context=ctx), console)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing: `format_options` lists arguments too."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section of the help page for each heading, in the order in which they first occur."""
        sections: dict[str, list[tuple[str, str]]] = {Argument.group: [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class Program(click.Group):
    """The group of all commands; its own options may be abbreviated too."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands in the order in which they were added; click sorts them."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words before and including the name of a command."""
        first = [full_name(word, _options_of(ctx), ctx) for word in args[:1]]
        return super().parse_args(ctx, [*first, *args[1:]])


def command(name: str, kind: type[Command] = Command) -> Decorator:
    """Make a command of a function of `Arguments` and a `Console`; its docstring is the help text."""
    return click.command(name, cls=kind, context_settings=CONTEXT)


def argument(name: str, help: str, **settings: Any) -> Decorator:
    """Add an `Argument` to a command."""
    return click.argument(name, cls=Argument, help=help, **settings)


def option(name: str, help: str, short: str | None = None, **settings: Any) -> Decorator:
    """Add an `Option` to a command; `short` is a second name, such as "-v"."""
    return click.option(*filter(None, (name, short)), cls=Option, help=help, **settings)


def flag(name: str, help: str, **settings: Any) -> Decorator:
    """Add an `Option` without a value to a command."""
    return option(name, help, is_flag=True, **settings)


def choice(*values: str) -> click.Choice[str]:
    """A type for one of some texts."""
    return click.Choice(values)


def together(*decorators: Decorator) -> Decorator:
    """Combine decorators into one, for options that commands share."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def spelled_words(words: Iterable[str], context: click.Context) -> list[str]:
    """Rewrite the words of a context's command; see `spell_out`."""
    return spell_out(words, _options_of(context), context)


def spell_out(words: Iterable[str], options: Mapping[str, click.Option], context: click.Context) -> list[str]:
    """Rewrite the words of a command for click, which knows no abbreviations and no options of several words.

    Names of options are completed, `--text a b` becomes `--text=a --text=b`, and positional arguments go to the end.
    A word that looks like an option is not taken as the value of the option before it.

    Raises:
        click.UsageError: an abbreviated name is ambiguous, or an option has no value.
    """
    left = deque(words)
    spelled: list[str] = []
    positional: list[str] = []
    while left:
        word = left.popleft()
        if word == "--":
            positional += left
            break
        if not _is_option(word):
            positional.append(word)
            continue
        given, sign, value = word.partition("=")
        name = full_name(given, options, context)
        found = options.get(name)
        if sign or found is None or found.is_flag:
            spelled.append(name + sign + value)
            continue
        values: list[str] = []
        while left and not _is_option(left[0]) and (not values or getattr(found, "several", False)):
            values.append(left.popleft())
        if not values and not context.resilient_parsing:
            raise click.BadOptionUsage(name, f"Option {name!r} requires a value.", context)
        spelled += [f"{name}={value}" for value in values]
    return [*spelled, "--", *positional]


def full_name(word: str, options: Iterable[str], context: click.Context) -> str:
    """The option that a word abbreviates; the word itself if it abbreviates none.

    Raises:
        click.UsageError: it abbreviates several.
    """
    if word in options or not word.startswith("--") or word == "--":
        return word
    found = [name for name in options if name.startswith(word)]
    if len(found) > 1 and not context.resilient_parsing:
        raise click.UsageError(f"Option {word!r} is ambiguous: it may mean {' or '.join(found)}.", context)
    return found[0] if len(found) == 1 else word


def _options_of(context: click.Context) -> dict[str, click.Option]:
    """Options of a context's command by each of their names."""
    options = [found for found in context.command.get_params(context) if isinstance(found, click.Option)]
    return {name: found for found in options for name in found.opts}


def _is_option(word: str) -> bool:
    """Whether a word is read as an option: a dash alone, a negative number and a text with spaces are not."""
    name = word.partition("=")[0]
    return name.startswith("-") and name != "-" and " " not in name and not re.match(r"-\.?\d", name)
