"""Raise an exception on SIGINT and SIGTERM, so that a command removes its temporary files."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

SECONDS_UNTIL_AGAIN = 0.01


class SaidElsewhere(SystemExit):
    """Exit without a message, because another process of the command reports the error."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM was received.

    Not a KeyboardInterrupt: once one has passed through code compiled at run time, as in the import of torch, Python
    ends the process by SIGINT, whatever its exit code.
    """


@contextmanager
def signals_raise() -> Iterator[None]:
    """Raise Interrupted inside the context on SIGINT and SIGTERM.

    An exception raised in `__del__` or in a callback of the garbage collector or of a weak reference reaches only
    `sys.unraisablehook`; the hook sends the signal again, or the run would continue. Compiled code that calls back
    into Python may turn Interrupted into an error of another type; it is replaced by Interrupted.
    """
    came: list[int] = []
    hook = sys.unraisablehook

    def interrupt(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise Interrupted

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.unraisablehook = partial(_send_again, hook)
    try:
        yield
    except Exception as error:
        if came:
            raise Interrupted from error
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


class Paused(Interrupted):
    """The first SIGINT while a line is read; see `Stops.raised`."""


class Stops:
    """How often SIGINT came since the last line of the user; see `stopping`.

    Attributes:
        count: the number of signals, which the reader of a line sets to 0.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raises = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise Paused inside the context at the first signal."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def take(self) -> None:
        """Count a signal; raise Interrupted at the second one."""
        self.count += 1
        if self.count > 1:
            raise Interrupted
        if self._raises:
            raise Paused


@contextmanager
def stopping() -> Iterator[Stops]:
    """A context in which the first SIGINT is counted, and the second one raises Interrupted.

    What runs looks at the count where it can stop, such as between two tokens of an answer: an exception in the middle
    of a change of weights would leave them changed in part.
    """
    stops = Stops()
    previous = signal.signal(signal.SIGINT, lambda _number, _frame: stops.take())
    try:
        yield stops
    finally:
        signal.signal(signal.SIGINT, previous)


def _send_again(hook: Callable[[Any], object], unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, Interrupted):
        # Not with threading: the interrupted code may hold its locks.
        _thread.start_new_thread(_send, ())
    else:
        hook(unraisable)


def _send() -> None:
    time.sleep(SECONDS_UNTIL_AGAIN)
    if callable(signal.getsignal(signal.SIGTERM)):  # else the command has ended
        os.kill(os.getpid(), signal.SIGTERM)
