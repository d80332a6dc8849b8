"""Postpone signals until a step that must not be interrupted is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def postponed_signals() -> Iterator[None]:
    """Postpone SIGINT and SIGTERM until the context ends. In other threads this does nothing: they get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    postponed: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Python cannot restore a handler that it did not install.
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    try:
        with ExitStack() as stack:
            for number, handler in handlers.items():
                # Register the restoration first: the handler of the other signal may raise at any moment.
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, _frame: postponed.append(number))
            yield
    finally:
        for came in postponed:
            signal.raise_signal(came)
