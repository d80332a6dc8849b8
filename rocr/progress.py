"""Progress reports of library calls, as callbacks instead of printed lines, and the durations of stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of one stage.

    Attributes:
        stage: The name of the stage.
        done: How much is done, in `unit`.
        total: How much there is to do, in `unit`; None if that is not known.
        unit: What is counted, such as "tokens".
        resumed: The part of `done` that an earlier run did. Leave it out when computing the speed of this run.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    resumed: int = 0


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore progress; the default callback."""


@dataclass(frozen=True)
class Stopwatch:
    """Measures the durations of stages.

    Attributes:
        seconds: The total duration of each stage so far, by its name.
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
