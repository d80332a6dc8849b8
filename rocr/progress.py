"""How library calls tell their caller how far they are, without printing anything."""

from __future__ import annotations

from collections.abc import Callable
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
