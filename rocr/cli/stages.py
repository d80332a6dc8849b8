"""Progress of a command's stages, and its display as lines; `rocr.cli.bars` has that of a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rocr.progress import Progress as Step
from rocr.progress import ProgressCallback

SECONDS_OF_A_LAST_LINE = 1.0
"""How long the end of a stage waits for a line that is being written, in seconds."""


@dataclass
class Count:
    """Progress of one part of a stage.

    A part may run several times, such as the questions about each candidate of `rocr redirects`. The rate is that of
    all rounds.

    Attributes:
        begun: start of the current round, in seconds of a monotonic clock.
        told: time of its last step.
        done: units done in the round.
        total: units of the round; None: unknown.
        unit: what is counted.
        resumed: units that an earlier run of the command had done.
        earlier_units: units of the rounds before.
        earlier_seconds: seconds of the rounds before.
    """

    begun: float
    told: float
    done: int = 0
    total: int | None = None
    unit: str = ""
    resumed: int = 0
    earlier_units: int = 0
    earlier_seconds: float = 0.0

    def take(self, step: Step, previous: float, now: float) -> None:
        """Record a step; a step behind the last one begins a new round."""
        if step.done < self.done or (step.done == self.done == self.total):
            self.earlier_units, self.earlier_seconds = self.units, self.seconds
            self.begun = previous
        self.told = now
        self.done, self.total, self.unit, self.resumed = step.done, step.total, step.unit, step.resumed

    @property
    def units(self) -> int:
        """Units done by this run of the command."""
        return self.earlier_units + self.done - self.resumed

    @property
    def seconds(self) -> float:
        """Seconds that they took."""
        return self.earlier_seconds + self.told - self.begun

    @property
    def rate(self) -> float | None:
        """Units per second up to the last step; None: unknown.

        Steps come in bursts, one for each question of a batch, so the time between two steps is not used.
        """
        return self.units / self.seconds if self.units > 0 and self.seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds from the last step to the end of the round; None: unknown."""
        return (self.total - self.done) / self.rate if self.total is not None and self.rate else None

    @property
    def is_done(self) -> bool:
        """Whether the last step was that of the end of the round."""
        return self.done == self.total

    def left_at(self, now: float) -> float | None:
        """Seconds from a time to the end of the round, negative if it takes longer; None: unknown, or it has ended."""
        return None if self.left is None or self.is_done else self.left - (now - self.told)

    def running(self, now: float) -> float:
        """Seconds that it took up to a time, or up to the end of its last round."""
        return self.seconds if self.is_done else self.seconds + now - self.told

    def counted(self) -> str:
        """Such as "1,024 of 8,192 tokens"."""
        return f"{self.done:,}" + (f" of {self.total:,}" if self.total else "") + f" {self.unit}"

    def speed(self) -> str:
        """Such as "0.42 tokens/s"; empty if unknown."""
        rate = self.rate
        if rate is None:
            return ""
        return f"{rate:,.0f} {self.unit}/s" if rate >= 9.5 else f"{rate:.2g} {self.unit}/s"


class Stage:
    """One stage and its parts.

    Attributes:
        name: of the stage.
        begun: its start, in seconds of a monotonic clock.
        parts: progress of each part, by name, in the order in which they began.
        current: name of the part of the last step; None: there was no step.
    """

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.begun = self._told = now
        self.parts: dict[str, Count] = {}
        self.current: str | None = None

    def take(self, step: Step, now: float) -> Count:
        """Record a step; a new part begins at the time of the step before."""
        count = self.parts.get(step.stage)
        if count is None:
            count = self.parts[step.stage] = Count(self._told, self._told)
        count.take(step, self._told, now)
        self._told, self.current = now, step.stage
        return count

    def line(self, now: float) -> str:
        """Part, units done and in total, rate and time left; without steps, how long the stage has been running."""
        if self.current is None:
            return f"{self.name}: running for {duration(now - self.begun)}"
        count = self.parts[self.current]
        left = count.left_at(now)
        time_left = "" if left is None else f"{duration(left)} left" if left > 0 else "longer than expected"
        return f"{self._named(self.current)}: " + ", ".join(filter(None, (count.counted(), count.speed(), time_left)))

    def last_lines(self, now: float) -> list[str]:
        """Units, seconds and rate of each part of a finished stage."""
        if not self.parts:
            return [f"{self.name}: {duration(now - self.begun)}"]
        return [
            f"{self._named(part)}: {count.units:,} {count.unit} in {duration(count.seconds)}"
            + (f", {count.speed()}" if count.speed() else "")
            for part, count in self.parts.items()
        ]

    def _named(self, part: str) -> str:
        return part if part == self.name else f"{self.name}, {part}"


@contextmanager
def plain_lines(name: str, write: Callable[[str], None], interval: float) -> Iterator[ProgressCallback]:
    """Show a stage without a terminal: a line every `interval` seconds, and lines at its end."""
    stage = Stage(name, time.monotonic())
    ticker = _Ticker(lambda: write(stage.line(time.monotonic())), interval)
    try:
        with suppress(RuntimeError):  # no thread can be started: continue without lines
            ticker.start()
        yield lambda step: _ignored(stage.take(step, time.monotonic()))
    finally:
        ticker.end()
    for line in stage.last_lines(time.monotonic()):
        write(line)


class _Ticker(threading.Thread):
    """Calls a function at an interval until it is ended."""

    def __init__(self, call: Callable[[], None], interval: float) -> None:
        super().__init__(daemon=True, name="rocr-progress")
        self._call, self._interval = call, interval
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(self._interval):
            with suppress(OSError, ValueError):  # a stream that was closed
                self._call()

    def end(self) -> None:
        """Stop calling, and wait for a call that is running."""
        self._ended.set()
        if self.is_alive():
            self.join(SECONDS_OF_A_LAST_LINE)


def duration(seconds: float) -> str:
    """Such as "0.4 s", "12 s", "3 min 20 s" or "2 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _ignored(_: object) -> None:
    """Discard a value, because a callback returns None."""
