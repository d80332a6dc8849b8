"""Go on in smaller pieces where the memory of a device does not do for a large one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def halving(run: Callable[[int], T], size: int, least: int = 1) -> T:
    """Return run(size), or that of half the size as often as memory runs out.

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
