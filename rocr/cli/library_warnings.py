"""Warnings of libraries during a command: hidden, or shown with -v above the progress instead of inside it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Show = Callable[[str], None]
OWN_HANDLERS = ("transformers", "huggingface_hub")
"""Libraries whose loggers write to the stderr of the time when they were imported, past the progress."""


@contextmanager
def library_warnings(show: Show, verbose: bool) -> Iterator[None]:
    """Write Python warnings and log messages of libraries as lines of a command.

    Which warnings there are is up to the filters, so that `PYTHONWARNINGS=error` still raises.

    Args:
        show: a function that writes a line.
        verbose: whether warnings are shown; log messages of the level ERROR always are.
    """

    def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if verbose:
            show(f"{category.__name__}: {message}")

    handler = _Lines(show, logging.WARNING if verbose else logging.ERROR)
    root = logging.getLogger()
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)


@contextmanager
def library_messages(verbose: bool) -> Iterator[None]:
    """Hide the warnings that libraries log, or pass them to the handler of `library_warnings`.

    Args:
        verbose: whether they are shown.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not verbose:
        transformers.utils.logging.set_verbosity_error()
        yield
        return
    found = [logging.getLogger(name) for name in OWN_HANDLERS]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in found]
    for logger in found:
        logger.setLevel(logging.WARNING)
        logger.propagate = True
        logger.handlers.clear()
    try:
        yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers[:] = handlers


class _Lines(logging.Handler):
    """Writes log messages as lines."""

    def __init__(self, show: Show, level: int) -> None:
        super().__init__(level)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(f"{record.name}: {record.getMessage()}")
