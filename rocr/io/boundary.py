"""Turn exceptions of code outside rocr, such as a model or a tokenizer, into an InputError with a readable message."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from rocr.errors import InputError, RocrError

MAX_REASON = 300
"""The number of characters of another library's message that are shown."""


@contextmanager
def calling(what: str, advice: str = "") -> Iterator[None]:
    """Turn an exception of code outside rocr into an InputError that names what was called.

    Errors of rocr itself, out-of-memory errors and disk errors pass unchanged: the caller handles them.

    Args:
        what: What is called and for which purpose, as the subject of a sentence, such as "The tokenizer of model".
        advice: A sentence that says what to do; empty for none.

    Raises:
        InputError: The code raised an exception, which is the cause of this error.
    """
    try:
        yield
    except (RocrError, MemoryError):
        raise
    except BaseException as error:
        if not is_code_error(error) or is_out_of_memory(error) or is_disk_error(error):
            raise
        raise InputError(f"{what} failed: {reason_of(error)}.{' ' if advice else ''}{advice}") from error


def is_code_error(error: BaseException) -> bool:
    """Return whether an exception is an error of the code that raised it, and not an interruption.

    A call of sys.exit and a panic of a library written in Rust count too, although they are no subclass of Exception.
    """
    return isinstance(error, (Exception, SystemExit)) or type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, with the second if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    message = " ".join(shown).rstrip(".")[:MAX_REASON]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the memory of the machine or of a device ran out."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def is_disk_error(error: BaseException) -> bool:
    """Return whether an exception says that a disk is full, read-only or failing."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
