"""Output of commands: progress and errors on stderr, tables on stdout, or one JSON document there with --json."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rocr.cli.stages import plain_lines
from rocr.io.json_values import json_text
from rocr.io.visible import visible
from rocr.progress import ProgressCallback, silent

if TYPE_CHECKING:
    import rich.console

SECONDS_BETWEEN_LINES = 30.0


class Console:
    """Output of one command; rich is imported when a command begins, or at the first line.

    Args:
        json_output: whether to write one JSON document to stdout, and tables to stderr.
        debug: whether to show the traceback of an error.
        seconds_between_lines: seconds between two lines of progress if stderr is not a terminal.

    Attributes:
        debug: whether to show the traceback of an error.
        seconds: duration of each stage, in seconds.
    """

    def __init__(
        self, json_output: bool = False, debug: bool = False, seconds_between_lines: float = SECONDS_BETWEEN_LINES
    ) -> None:
        self._json, self.debug, self._interval = json_output, debug, seconds_between_lines
        self.seconds: dict[str, float] = {}
        self._rank = 0
        self._quiet = False

    @cached_property
    def _errors(self) -> rich.console.Console:
        import rich.console

        return rich.console.Console(stderr=True, highlight=False)

    @cached_property
    def _output(self) -> rich.console.Console:
        import rich.console

        return self._errors if self._json else rich.console.Console(highlight=False)

    @property
    def writes_json(self) -> bool:
        """Whether a JSON document is written, with --json."""
        return self._json

    def begin(self, debug: bool, quiet: bool = False) -> None:
        """Prepare for a command. rich is imported now: an import may fail once memory or open files run out.

        Args:
            debug: whether to show the traceback of an error.
            quiet: whether to show no progress.
        """
        self.debug, self._quiet = debug, quiet
        self._output.quiet = self._errors.quiet = False

    def speak_as(self, rank: int) -> None:
        """Set the rank of this process among those that run the command; ranks above 0 print only errors."""
        self._rank = rank
        self._json = self._json and rank == 0
        self._output.quiet = self._errors.quiet = rank > 0

    @contextmanager
    def stage(self, name: str) -> Iterator[ProgressCallback]:
        """Time a stage and show its progress."""
        start = time.perf_counter()
        with self._shown(name) as show:
            yield show
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _shown(self, name: str) -> AbstractContextManager[ProgressCallback]:
        if self._quiet or self._errors.quiet:
            return nullcontext(silent)
        # FORCE_COLOR makes rich call a file interactive.
        if self._errors.is_interactive and sys.stderr.isatty():
            from rocr.cli.bars import bars

            return bars(name, self._errors)
        return plain_lines(name, self._line, self._interval)

    def _line(self, text: str) -> None:
        self._errors.print(visible(text), markup=False, soft_wrap=True)

    def screen(self) -> rich.console.Console | None:
        """The console of the result if a person is there: stdin and stdout are a terminal, and --json is not given."""
        talks = not self._json and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        return self._output if talks else None

    def say(self, sentence: str) -> None:
        """Print a line of the result."""
        self._output.print(visible(sentence), markup=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print a warning."""
        from rich.text import Text

        self._errors.print(Text(visible(sentence), style="yellow"), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of the result; columns of numbers are aligned right."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title, title_justify="left", title_style="bold", show_lines=any("\n" in c for r in rows for c in r)
        )
        for i, column in enumerate(columns):
            numeric = bool(rows) and all(_is_number(row[i]) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        self._output.print(table)

    def fail(
        self, sentence: str, exit_code: int, details: dict[str, Any] | None = None, error: BaseException | None = None
    ) -> None:
        """Print an error, and its traceback with --debug; details go to the JSON document only."""
        from rich.text import Text

        trace = "".join(traceback.format_exception(error)) if self.debug and error is not None else ""
        document = {"error": sentence, "exit_code": exit_code, **(details or {})}
        speaker = f"rocr, process {self._rank}: " if self._rank else "rocr: "
        self._errors.quiet = False
        self._errors.print(Text.assemble((speaker, "bold red"), visible(sentence)), soft_wrap=True)
        for line in trace.splitlines():
            self._line(line)
        self.print_json(document | ({"traceback": trace} if trace else {}))

    def print_json(self, document: Any) -> None:
        """Write the JSON document to stdout if --json is given."""
        if not self._json or document is None:
            return
        sys.stdout.write(json_text(document, 2, sys.stdout.encoding or "utf-8") + "\n")


def _is_number(cell: str) -> bool:
    return cell.replace(".", "").replace(",", "").replace("%", "").replace("-", "").strip().isdigit()
