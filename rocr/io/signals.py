"""Signals that wait until a step is done which must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def postponed_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the context ends; only the main thread ever gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A handler that Python did not install cannot be put back by it.
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    try:
        with ExitStack() as stack:
            for number, handler in handlers.items():
                # First of all how to put it back: the handler of the other signal may raise at any moment.
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, _frame: waiting.append(number))
            yield
    finally:
        for came in waiting:
            signal.raise_signal(came)
