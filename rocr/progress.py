"""How library calls tell their caller how far they are, without printing anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step of a stage.

    Attributes:
        stage: what is being done.
        done: how much of it is done, in `unit`.
        total: how much there is; None where that is not known.
        unit: what is counted.
        resumed: how much of `done` an earlier run had done, which says nothing about the speed of this one.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    resumed: int = 0


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore progress: the default."""


@dataclass(frozen=True)
class Stopwatch:
    """Adds up the durations of stages.

    Attributes:
        seconds: duration of each stage so far, by its name.
    """

    seconds: dict[str, float]

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the duration of the context to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
