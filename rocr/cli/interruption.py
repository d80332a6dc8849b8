"""SIGINT and SIGTERM unwind a command, so that temporary files are removed."""

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
    """The command ends with an exit code and no word of its own: another process of it says what is wrong."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came.

    Not a KeyboardInterrupt: Python ends a process by SIGINT, whatever its exit code, once one has passed
    through code that was compiled at run time, as the import of torch does.
    """


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Interrupted inside the context, wherever it is just then, and end it with that.

    What is raised in a callback of the garbage collector, of a weak reference or in `__del__` gets no further than
    Python's hook for exceptions that cannot be raised. There the signal is sent again, or the run would go on. What
    is raised while compiled code calls back may come out of it as an error of another kind, which it then replaces.
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


def _send_again(hook: Callable[[Any], object], unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, Interrupted):
        # Not through threading, whose locks the interrupted code may hold.
        _thread.start_new_thread(_send, ())
    else:
        hook(unraisable)


def _send() -> None:
    time.sleep(SECONDS_UNTIL_AGAIN)
    if callable(signal.getsignal(signal.SIGTERM)):  # else the command has come to its end
        os.kill(os.getpid(), signal.SIGTERM)
