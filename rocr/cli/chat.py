"""`rocr chat`: talk to the edited model of an output folder, beside the original."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rocr.cli.console import Console
from rocr.cli.conversation import HELP, Conversation, Turn
from rocr.cli.interruption import Paused, Stops, stopping
from rocr.cli.parsing import Arguments, command
from rocr.cli.tables import number_of_concepts
from rocr.cli.talk import Talk, asking, load_talk, sides_of
from rocr.errors import InputError, RocrError

if TYPE_CHECKING:
    import rich.console

PROMPT = "> "


@command("chat")
@asking
def chat(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Ask an edited model and the original, and read both answers.

    On a terminal, answers appear side by side as they are written; /help lists the commands. Otherwise questions and
    commands are the lines of stdin. Both answer from one loaded model, with the edit applied and reverted.
    """
    talk = load_talk(arguments, console)
    conversation = Conversation(arguments.show, talk.check_original)
    screen = console.screen()
    if screen is None:
        _read_lines(conversation, talk, console, sys.stdin)
    else:
        with suppress(ImportError):
            import readline  # noqa: F401  # input() then edits lines and keeps a history
        console.say(f"{arguments.folder}: {number_of_concepts(talk.edited.edit.concepts)} redirected.\n{HELP}")
        with stopping() as stops:
            _converse(conversation, talk, console, screen, stops)
    return {"folder": arguments.folder, "turns": conversation.to_json(), "seconds": console.seconds}


def _read_lines(conversation: Conversation, talk: Talk, console: Console, lines: Iterable[str]) -> None:
    """Answer the lines of a file; the first one that cannot be answered ends the command.

    Raises:
        InputError: a line is no question and no command, or is not UTF-8.
    """
    for number, line in _numbered(lines):
        try:
            given = conversation.read(line)
        except InputError as error:
            raise InputError(f"Line {number} of stdin: {error}") from error
        if isinstance(given, Turn):
            for side in sides_of(conversation.shown):
                given.answers[side] = talk.answer(side, given.question, lambda _text: True)
            console.say("\n".join(given.lines()))
        elif given is not None:
            console.say(given)
        if conversation.ended:
            return


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except UnicodeDecodeError as error:
        raise InputError(f"Stdin is not {error.encoding.upper()} after line {number}.") from None


def _converse(
    conversation: Conversation, talk: Talk, console: Console, screen: rich.console.Console, stops: Stops
) -> None:
    """Read lines from the terminal and answer them until the user leaves."""
    while not conversation.ended:
        try:
            with stops.raised():
                line = input(PROMPT)
        except EOFError:
            console.say("")
            return
        except Paused:
            console.say("\nCtrl-C again leaves.")
            continue
        except UnicodeDecodeError:
            console.warn("The line is not UTF-8.")
            continue
        stops.count = 0
        try:
            given = conversation.read(line)
            if isinstance(given, Turn):
                _answer(given, conversation.shown, talk, screen, stops)
            elif given is not None:
                console.say(given)
        except RocrError as error:
            console.warn(str(error))


def _answer(turn: Turn, shown: str, talk: Talk, screen: rich.console.Console, stops: Stops) -> None:
    """Draw the answers to a question as they are written, until Ctrl-C."""
    from rocr.cli.columns import answers_on

    sides = sides_of(shown)
    with answers_on(screen, sides) as drawn:
        for side in sides:
            if stops.count:
                break

            def show(text: str, side: str = side) -> bool:
                drawn.show(side, text)
                return stops.count == 0

            turn.answers[side] = talk.answer(side, turn.question, show)
            drawn.show(side, turn.answers[side])
    turn.stopped = stops.count > 0
