"""Limits of time and memory for hostile inputs, and their measurement."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 20  # of the processor, on a slow machine that others share; at most 1.5 s were measured on a quiet one
WAITING_SECONDS = 600  # on the wall, for what waits without computing
MEMORY = 2**30


class Hangs(BaseException):
    """The code waits although it should refuse its input."""


@pytest.fixture(scope="session")
def within_limits() -> Callable[[], AbstractContextManager[None]]:
    """within_limits(): a context that must take less than 20 s and 1 GiB more memory than there was before."""
    return _within_limits


@contextmanager
def _within_limits() -> Iterator[None]:
    handler = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, WAITING_SECONDS)
    reset_peak()
    before, started = peak_bytes(), time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    seconds, taken = time.process_time() - started, peak_bytes() - before
    assert seconds < SECONDS, f"it took {seconds:.1f} s of the processor"
    assert taken < MEMORY, f"it took {taken / 2**20:,.0f} MiB"


def reset_peak() -> None:
    """Reset the peak of memory that the kernel keeps for this process, where it allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """Return the peak of memory of this process since the last reset."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _hang(*_: Any) -> None:
    raise Hangs(f"nothing came within {WAITING_SECONDS} s")
