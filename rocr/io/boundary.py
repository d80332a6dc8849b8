"""The boundary to code of others: what a model, a tokenizer or a reader raises becomes a sentence with its cause."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from rocr.errors import InputError, RocrError

MAX_REASON = 300
"""Characters of another library's message that are shown."""


@contextmanager
def calling(what: str, advice: str = "") -> Iterator[None]:
    """Turn an exception of code that rocr did not write into an InputError that names what was called.

    Errors of rocr itself, a lack of memory and the errors of a disk pass as they are: who called knows more of them.

    Args:
        what: what is called and for which purpose, as the subject of a sentence, such as "The tokenizer of model".
        advice: a sentence that says what to do about it; empty: none.

    Raises:
        InputError: the code raised an exception, which is the cause of this one.
    """
    try:
        yield
    except (RocrError, MemoryError):
        raise
    except BaseException as error:
        if not is_of_code(error) or is_out_of_memory(error) or is_of_the_disk(error):
            raise
        raise InputError(f"{what} failed: {reason_of(error)}.{' ' if advice else ''}{advice}") from error


def is_of_code(error: BaseException) -> bool:
    """Whether an exception is of the code that raised it, and not of who stops it.

    A call of sys.exit and a panic of a library written in Rust are no Exception, but count.
    """
    return isinstance(error, (Exception, SystemExit)) or type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, and the next where it ends in a colon, after the exception's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    message = " ".join(shown).rstrip(".")[:MAX_REASON]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the machine or of a device, ran out."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an exception says that a disk is full or fails, rather than that a file is not as expected."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
