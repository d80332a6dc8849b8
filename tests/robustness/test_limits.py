"""The fixture `within_limits` fails for each limit that is exceeded."""

import sys
import time

import pytest


@pytest.fixture
def limits():
    return sys.modules["tests.support.limits"]


def test_memory_that_is_free_again_is_seen(within_limits, limits, monkeypatch):
    monkeypatch.setattr(limits, "MEMORY", 2**25)
    with pytest.raises(AssertionError, match="MiB"), within_limits():
        b"x" * 2**29  # far above the limit, since memory of earlier tests may be freed meanwhile
    with within_limits():
        b"x" * 2**22


def test_seconds_of_the_processor_are_seen(within_limits, limits, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.02)
    with pytest.raises(AssertionError, match="of the processor"), within_limits():
        sum(range(5 * 10**6))


def test_waiting_without_end_is_stopped(within_limits, limits, monkeypatch):
    monkeypatch.setattr(limits, "WAITING_SECONDS", 0.05)
    with pytest.raises(limits.Hangs), within_limits():
        time.sleep(30)
