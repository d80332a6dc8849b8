"""Retry with smaller batches after a CUDA out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def retry_with_smaller_batch(run: Callable[[int], T], size: int, least: int = 1) -> T:
    """Retry with smaller batches after a CUDA out-of-memory error.

    Args:
        run: A function of the batch size.
        size: The first batch size to try; each retry halves it.
        least: The smallest batch size to try.

    Returns:
        The result of the first call that does not run out of memory.

    Raises:
        torch.OutOfMemoryError: The memory does not suffice for a batch of `least`.
    """
    while True:
        try:
            return run(size)
        except torch.cuda.OutOfMemoryError:
            if size <= least:
                raise
        # Retry outside the handler: the traceback there keeps the tensors of the failed run alive.
        size = max(least, size // 2)
