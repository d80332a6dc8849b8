"""Progress reports of library calls to their callers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step of a stage.

    Attributes:
        stage: The name of the stage.
        done: The amount that is done, in `unit`.
        total: The whole amount, in `unit`. None: unknown.
        unit: The unit, such as "tokens".
        resumed: The part of `done` that an earlier run did; the speed of this run does not include it.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    resumed: int = 0


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore progress. This is the default callback."""


@dataclass(frozen=True)
class Stopwatch:
    """Sums the durations of stages.

    Attributes:
        seconds: The duration of each stage so far, by name.
    """

    seconds: dict[str, float]

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the duration of the context to that of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
