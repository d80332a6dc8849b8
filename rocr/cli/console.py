"""What a person sees: progress, tables and errors on stderr; one JSON document on stdout where asked for."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rocr.progress import Progress as Step
from rocr.progress import ProgressCallback
from rocr.spelling import hidden

MAX_SHOWN = 20_000
"""Characters of one text: fifty errors with names of the allowed length are fewer."""


class Console:
    """The terminal of one command.

    Attributes:
        seconds: duration of each stage that `stage` timed.
    """

    def __init__(self, json_output: bool = False) -> None:
        self._json = json_output
        self._errors = rich.console.Console(stderr=True, highlight=False)
        self._output = self._errors if json_output else rich.console.Console(highlight=False)
        self.seconds: dict[str, float] = {}
        self._rank = 0

    def speak_as(self, rank: int) -> None:
        """Be one of several processes that run the same command: all but process 0 print nothing but errors."""
        self._rank = rank
        self._json = self._json and rank == 0
        self._output.quiet = self._errors.quiet = rank > 0

    @contextmanager
    def stage(self, name: str) -> Iterator[ProgressCallback]:
        """Time a stage and show how far it is."""
        start = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counted]}"),
            _SpeedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=self._errors) as display:
            tasks = {name: display.add_task(name, total=None, counted="", unit="")}

            def show(step: Step) -> None:
                task = self._task(display, tasks, step, name)
                counted = f"{step.done:,}" + (f" of {step.total:,}" if step.total else "") + f" {step.unit}"
                display.update(task, total=step.total, completed=step.done, counted=counted, unit=step.unit)

            yield show
            for task in display.tasks:
                display.update(task.id, total=task.completed or 1, completed=task.completed or 1)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def say(self, sentence: str) -> None:
        """Print a line of the result."""
        self._output.print(visible(sentence), markup=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print a line that wants attention."""
        self._errors.print(Text(visible(sentence), style="yellow"), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of the result; numbers stand right."""
        table = Table(
            title=title, title_justify="left", title_style="bold", show_lines=any("\n" in c for r in rows for c in r)
        )
        for i, column in enumerate(columns):
            numeric = bool(rows) and all(_is_number(row[i]) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        self._output.print(table)

    def fail(self, sentence: str, exit_code: int, details: dict[str, Any] | None = None) -> None:
        """Print an error; details go to the JSON document only."""
        if self._rank:
            sys.stderr.write(f"rocr, process {self._rank}: {visible(sentence)}\n")
        self._errors.print(Text.assemble(("rocr: ", "bold red"), visible(sentence)), soft_wrap=True)
        self.print_json({"error": sentence, "exit_code": exit_code, **(details or {})})

    def print_json(self, document: Any) -> None:
        """Put the JSON document on stdout, where one is asked for."""
        if self._json and document is not None:
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def _task(self, display: Progress, tasks: dict[str, TaskID], step: Step, first: str) -> TaskID:
        if step.stage not in tasks:
            # The stage's own line was a placeholder until its first step.
            if first in tasks and not display.tasks[0].completed:
                display.update(tasks[first], visible=False)
            tasks[step.stage] = display.add_task(step.stage, total=step.total, counted="", unit=step.unit)
        return tasks[step.stage]


class _SpeedColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "")


def visible(text: str) -> str:
    """The text with characters that would steer the terminal, or hide in it, written as their codes.

    Joiners and selectors that belong to a word's spelling stay.
    """
    if len(text) > MAX_SHOWN:
        text = text[:MAX_SHOWN] + "…"
    unseen = {index for index, _ in hidden(text)}
    return "".join(
        f"\\u{ord(character):04x}"
        if character not in "\n\t" and (index in unseen or unicodedata.category(character) in ("Co", "Cn"))
        else character
        for index, character in enumerate(text)
    )


def _is_number(cell: str) -> bool:
    return cell.replace(".", "").replace(",", "").replace("%", "").replace("-", "").strip().isdigit()
