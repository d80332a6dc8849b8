"""From arguments to exit code. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from rocr import __version__
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
    console = Console(json_output=parsed.json)
    try:
        with signals_raise(), ExitStack() as parsed.until_the_end:
            console.print_json(parsed.run(parsed, console))
        return 0
    except RocrError as error:
        console.fail(str(error), error.exit_code, error.details)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt):
        console.fail("Interrupted; nothing was left half-written.", EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    except (MemoryError, OSError) as error:
        code = EXIT_BAD_INPUT if getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP) else EXIT_FAILED
        console.fail(f"The system refused: {str(error)[:1000] or 'out of memory'}.", code)
        return code
    except RecursionError:
        console.fail("The input is nested too deeply.", EXIT_BAD_INPUT)
        return EXIT_BAD_INPUT
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate" not in str(error):
            raise
        console.fail(f"Out of memory: {error}", EXIT_FAILED)
        return EXIT_FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="rocr", description="Unlearn concepts from language models, in closed form.", epilog=_EPILOGUE
    )
    parser.add_argument("--version", action="version", version=f"rocr {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="put one JSON document on stdout")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parsers(subparsers, common)
    return parser
