"""From arguments to exit code. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rocr import __version__
from rocr.boundary import is_out_of_memory, reason_of
from rocr.cli import compare, doctor, edits, evaluate, info, redirects, stats, unlearn, verify
from rocr.cli.console import Console
from rocr.cli.interruption import Interrupted, signals_raise
from rocr.errors import RocrError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
COMMANDS = (unlearn, stats, edits, evaluate, redirects, compare, info, verify, doctor)

_EPILOGUE = (
    """exit codes: 0 done, 1 failed, 2 bad input, 3 verification failed, 4 refused by a guard, 130 interrupted"""
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parsed = build_parser().parse_args(arguments)
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; rocr shows one for each stage
    _write_any_character()
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
    except Exception as error:
        sentence, code, details = _judged(error)
        console.fail(sentence, code, details, error)
        return code


def _judged(error: Exception) -> tuple[str, int, dict[str, Any]]:
    """What is said of an exception that ends a command, its exit code, and JSON values beside them."""
    if isinstance(error, RocrError):
        return str(error), error.exit_code, error.details
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="rocr", description="Unlearn concepts from language models, in closed form.", epilog=_EPILOGUE
    )
    parser.add_argument("--version", action="version", version=f"rocr {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error too")
    common.add_argument("--json", action="store_true", help="put one JSON document on stdout")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parsers(subparsers, common)
    return parser
