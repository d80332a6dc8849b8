"""From arguments to an exit code. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import errno
import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from rocr import __version__
from rocr.cli.add import add
from rocr.cli.aliases import aliases
from rocr.cli.apply import apply
from rocr.cli.ask import ask
from rocr.cli.change import merge, remove
from rocr.cli.chat import chat
from rocr.cli.compare import compare
from rocr.cli.console import Console
from rocr.cli.demo import demo
from rocr.cli.doctor import doctor
from rocr.cli.evaluate import evaluate
from rocr.cli.info import info
from rocr.cli.interruption import Interrupted, SaidElsewhere, signals_raise
from rocr.cli.parsing import CONTEXT, Program
from rocr.cli.plan_command import plan
from rocr.cli.redirects import redirects
from rocr.cli.revert import revert
from rocr.cli.stats import stats
from rocr.cli.unlearn import unlearn
from rocr.cli.verify import verify
from rocr.errors import RocrError
from rocr.io.boundary import is_code_error, is_out_of_memory, reason_of

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
MAX_USAGE_ERROR = 300
COMPLETION = "_ROCR_COMPLETE"
EPILOG = f"""\
Exit codes: 0 done, 1 failed, 2 bad input, 3 verification failed, 4 refused by a guard, 130 interrupted.

Shell completion: eval "$({COMPLETION}=bash_source rocr)" in bash, zsh_source in zsh.
"""

program = Program(
    "rocr",
    commands=(
        *(unlearn, plan, stats, ask, chat, apply, revert, add, remove, merge),
        *(evaluate, redirects, aliases, compare, info, verify, doctor, demo),
    ),
    help="Unlearn concepts from language models, in closed form.",
    epilog=EPILOG,
    context_settings=CONTEXT,
    no_args_is_help=False,
)
click.version_option(__version__, message="rocr %(version)s")(program)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words of the command line, without the name of the program (default: those of the process).

    Returns:
        The exit code.
    """
    _write_any_character()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if COMPLETION in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(program, {}, "rocr", COMPLETION, os.environ[COMPLETION])
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; rocr shows one for each stage
    console = Console(json_output=_asks_for_json(words))
    try:
        with signals_raise(), program.make_context("rocr", words, obj=console) as context:
            console.print_json(program.invoke(context))
        return 0
    except click.exceptions.Exit as ended:  # after --help or --version
        return ended.exit_code
    except (Interrupted, KeyboardInterrupt):
        console.fail("Interrupted; no partial output was left.", EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except BaseException as error:
        if _reader_is_gone(error):
            sys.stderr.close()
            return EXIT_FAILED
        if isinstance(error, SaidElsewhere) or not is_code_error(error):
            raise
        sentence, code, details = _judged(error)
        console.fail(sentence, code, details, error)
        return code


def _reader_is_gone(error: BaseException) -> bool:
    """Return whether the program that reads the output has ended, as `head` does. rich raises SystemExit then."""
    first = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(first, BrokenPipeError)


def _asks_for_json(words: Sequence[str]) -> bool:
    """Whether --json is given, which must be known even if the words cannot be parsed; also abbreviated."""
    options = itertools.takewhile(lambda word: word != "--", words)
    return any(len(word) > 2 and "--json".startswith(word) for word in options)


def _judged(error: BaseException) -> tuple[str, int, dict[str, Any]]:
    """The sentence that describes an exception, its exit code, and further values for the JSON document."""
    if isinstance(error, RocrError):
        return str(error), error.exit_code, error.details
    if isinstance(error, click.UsageError):
        return _usage_error(error), EXIT_BAD_INPUT, {}
    if isinstance(error, SystemExit):
        return (
            f"Code of the model or of a library ended the run with {reason_of(error)}.",
            EXIT_FAILED,
            {},
        )
    if isinstance(error, RecursionError):
        return "The input is nested too deeply.", EXIT_BAD_INPUT, {}
    if isinstance(error, OSError):
        code = EXIT_BAD_INPUT if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else EXIT_FAILED
        return f"The operating system reported an error: {str(error)[:1000]}.", code, {}
    if is_out_of_memory(error):
        return f"Out of memory: {str(error)[:1000] or 'the system has no more'}.", EXIT_FAILED, {}
    return (
        f"Unexpected {reason_of(error)}: this is a bug of rocr. Run the command again with --debug and report the "
        "traceback.",
        EXIT_FAILED,
        {},
    )


def _usage_error(error: click.UsageError) -> str:
    """What is wrong with the arguments, and where they are explained."""
    message = " ".join(error.format_message().split())
    if len(message) > MAX_USAGE_ERROR:
        message = f"{message[:MAX_USAGE_ERROR]}..."
    path = error.ctx.command_path if error.ctx is not None else "rocr"
    return f"{message} See {path} --help."


def _write_any_character() -> None:
    """Write characters that the terminal's encoding lacks as escape codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
