"""From arguments to exit code. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

from rocr import __version__
from rocr.cli import compare, doctor, edits, evaluate, info, redirects, stats, unlearn, verify
from rocr.cli.console import Console
from rocr.cli.interruption import Interrupted, SaidElsewhere, signals_raise
from rocr.errors import RocrError
from rocr.io.boundary import is_code_error, is_out_of_memory, reason_of

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
COMMANDS = (unlearn, stats, edits, evaluate, redirects, compare, info, verify, doctor)

_EPILOGUE = (
    """exit codes: 0 done, 1 failed, 2 bad input, 3 verification failed, 4 refused by a guard, 130 interrupted"""
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _write_any_character()
    words = sys.argv[1:] if arguments is None else arguments
    # Also abbreviated, as argparse takes it.
    parsed = build_parser(any(len(word) > 2 and "--json".startswith(word) for word in words)).parse_args(words)
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; rocr shows one for each stage
    console = Console(json_output=parsed.json, debug=parsed.debug)
    try:
        with signals_raise(), ExitStack() as parsed.until_the_end:
            console.print_json(parsed.run(parsed, console))
        return 0
    except (Interrupted, KeyboardInterrupt):
        console.fail("Interrupted; nothing was left half-written.", EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    except BaseException as error:
        if isinstance(error, SaidElsewhere) or not is_code_error(error):
            raise
        sentence, code, details = _judged(error)
        console.fail(sentence, code, details, error)
        return code


def _judged(error: BaseException) -> tuple[str, int, dict[str, Any]]:
    """What is said of an exception that ends a command, its exit code, and JSON values beside them."""
    if isinstance(error, RocrError):
        return str(error), error.exit_code, error.details
    if isinstance(error, SystemExit):
        return (
            f"Code that rocr called, of the model or of a library, ended the run by {reason_of(error)}.",
            EXIT_FAILED,
            {},
        )
    if isinstance(error, RecursionError):
        return "The input is nested too deeply.", EXIT_BAD_INPUT, {}
    if isinstance(error, OSError):
        code = EXIT_BAD_INPUT if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else EXIT_FAILED
        return f"The system refused: {str(error)[:1000]}.", code, {}
    if is_out_of_memory(error):
        return f"Out of memory: {str(error)[:1000] or 'the system has no more'}.", EXIT_FAILED, {}
    return (
        f"An error that rocr does not expect, {reason_of(error)}: this is a bug of rocr. Run the command again with "
        "--debug to see where it happens, and report that.",
        EXIT_FAILED,
        {},
    )


def _write_any_character() -> None:
    """Let a name that the terminal cannot show, or that is not UTF-8, be written as its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are JSON documents too, where these are asked for."""

    json_output = False

    def error(self, message: str) -> NoReturn:
        Console(self.json_output).print_json({"error": f"{self.prog}: {message}", "exit_code": EXIT_BAD_INPUT})
        super().error(message)


def build_parser(json_output: bool = False) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        json_output: whether an error in the arguments is put on stdout as a JSON document.
    """
    parser = _Parser(
        prog="rocr",
        description="Unlearn concepts from language models, in closed form.",
        epilog=_EPILOGUE,
    )
    parser.add_argument("--version", action="version", version=f"rocr {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error too")
    common.add_argument("--json", action="store_true", help="put one JSON document on stdout")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parsers(subparsers, common)
    for below in (parser, *subparsers.choices.values()):
        below.json_output = json_output
    return parser
