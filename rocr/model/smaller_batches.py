"""Retry with smaller batches after a device runs out of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def halving(run: Callable[[int], T], size: int, least: int = 1) -> T:
    """Return run(size); each time memory runs out, retry with half the size.

    Raises:
        torch.OutOfMemoryError: it does not even do for `least`.
    """
    while True:
        try:
            return run(size)
        except torch.cuda.OutOfMemoryError:
            if size <= least:
                raise
        # Outside the handler, whose traceback holds what the failed run had allocated.
        size = max(least, size // 2)
