"""The process group of a command that torchrun starts in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rocr.errors import InputError, RocrError
from rocr.io.boundary import calling

if TYPE_CHECKING:
    from rocr.statistics.distributed import Distributed

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another process, so also the longest time of a batch; the end of a process is noticed at once."""


@contextmanager
def process_group(device: str | None) -> Iterator[Distributed]:
    """Join the processes that torchrun started; a process started without it is alone.

    Args:
        device: device of the model; the backend is nccl if it begins with "cuda", else gloo.

    Raises:
        InputError: a variable of the environment is not as torchrun sets it.
        RocrError: the other processes cannot be reached.
    """
    from rocr.statistics.distributed import Distributed

    size = _number("WORLD_SIZE", 1)
    if size < 2:
        yield Distributed()
        return
    import torch
    import torch.distributed as dist

    _number("RANK", None)
    on_gpu = device is not None and device.startswith("cuda") and torch.cuda.is_available()
    if on_gpu:
        with calling(f"The device {device}"):
            torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise RocrError(f"The {size} processes cannot be joined: {reason}. Start them with torchrun.") from error
    yield Distributed.default_group()
    # Only after success: this call waits for the other processes, of which one may be lost.
    dist.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """The device of this process; for "cuda" without a number, the GPU of its LOCAL_RANK."""
    if device == "cuda" and _number("WORLD_SIZE", 1) > 1:
        return f"cuda:{_number('LOCAL_RANK', 0)}"
    return device


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise InputError(f"The environment's {name} is {text[:40]!r}, not a number: start the processes with torchrun.")
    return int(text)
