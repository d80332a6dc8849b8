"""Signals: postponed until a step that must not be interrupted is done, and cleaned up after where they arrive."""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
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


def end_interrupted_contexts(error: BaseException) -> None:
    """Run the ends of the context managers that an exception interrupted within their own code.

    A signal can arrive when Python enters `__exit__`, or leaves `__enter__`. The generator of a context manager is then
    suspended, and a frame of the traceback keeps it alive, with its hooks and settings, until the garbage is collected.
    Clearing the frame runs its `finally` blocks.
    """
    chain: BaseException | None = error
    seen: set[int] = set()
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        for frame, _ in traceback.walk_tb(chain.__traceback__):
            code = frame.f_code
            if code.co_filename == contextlib.__file__ or code.co_name in ("__enter__", "__exit__"):
                with contextlib.suppress(RuntimeError):  # the frame is still running
                    frame.clear()
        chain = chain.__context__
