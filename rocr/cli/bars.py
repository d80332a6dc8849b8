"""Progress of a command's stages as bars on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from rocr.cli.stages import Count, Stage, duration
from rocr.progress import Progress as Step
from rocr.progress import ProgressCallback


@contextmanager
def bars(name: str, console: rich.console.Console) -> Iterator[ProgressCallback]:
    """Show a stage on a terminal: a bar for each part."""
    stage = Stage(name, time.monotonic())
    columns = (TextColumn("{task.description}"), BarColumn(), _CountColumn())
    with Progress(*columns, console=console) as display:
        tasks = {name: display.add_task(name, total=None, count=None)}

        def show(step: Step) -> None:
            count = stage.take(step, time.monotonic())
            if step.stage not in tasks:
                # The bar of the stage is a placeholder until its first step.
                display.update(tasks[name], visible=name in stage.parts)
                tasks[step.stage] = display.add_task(step.stage, total=step.total, count=count)
            display.update(tasks[step.stage], total=step.total, completed=step.done, count=count)

        yield show
        for task in display.tasks:
            display.update(task.id, total=task.completed or 1, completed=task.completed or 1)


class _CountColumn(ProgressColumn):
    """Units done, rate, and the time left; the time taken if that is unknown or over, and for a finished part."""

    def render(self, task: Task) -> Text:
        count: Count | None = task.fields["count"]
        if count is None:
            return Text(duration(task.elapsed or 0.0))
        now = time.monotonic()
        left = count.left_at(now)
        seconds = f"{duration(left)} left" if left is not None and left > 0 else duration(count.running(now))
        return Text("  ".join(filter(None, [count.counted(), count.speed(), seconds])))
