"""The process group of a command that torchrun started several times."""

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
"""How long a process waits for one that hangs; one that has ended is noticed at once. A batch must take less."""


@contextmanager
def process_group(device: str | None) -> Iterator[Distributed]:
    """Join the processes that torchrun started with this one; alone where the environment knows of none.

    Args:
        device: where the model goes: on "cuda" and what begins like it, the processes talk by nccl, else by gloo.

    Raises:
        InputError: the environment is not as torchrun sets it.
        RocrError: the others are not there.
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
        raise RocrError(f"The {size} processes cannot be joined: {reason}. Start them by torchrun.") from error
    yield Distributed.default_group()
    # Only after success: where another process is lost, an orderly end would wait for it.
    dist.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """The device of this process: of "cuda" without a number, the GPU that torchrun means for it."""
    if device == "cuda" and _number("WORLD_SIZE", 1) > 1:
        return f"cuda:{_number('LOCAL_RANK', 0)}"
    return device


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise InputError(f"The environment's {name} is {text[:40]!r}, not a number: start the processes by torchrun.")
    return int(text)
