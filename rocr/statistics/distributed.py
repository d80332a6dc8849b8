"""Collection of statistics by several processes, with torch.distributed.

In each round, every process runs one batch; a barrier follows. The barrier detects a lost process, so that no process
waits for one longer than a batch takes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rocr.errors import InputError, RocrError
from rocr.statistics.sums import LayerSums

T = TypeVar("T")
BLOCK_ELEMENTS = 2**23
"""Number of elements of a matrix that are summed over the processes at a time: 64 MiB in float64."""


class OtherRankError(RocrError):
    """The error of another process, which ended the collection in all processes."""

    is_broadcast = True

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass
class Distributed:
    """This process in a group of processes that share work; by default a group of one.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        lost: Whether a process of the group can no longer be reached.
    """

    rank: int = 0
    size: int = 1
    lost: bool = False

    @classmethod
    def default_group(cls) -> Distributed:
        """Return the default process group of torch.distributed, or a group of one if none is initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self) -> dict[str, Any]:
        """Return JSON values that identify the share of this process; empty for a single process."""
        return {"share": [self.rank, self.size]} if self.size > 1 else {}

    def owns(self, number: int) -> bool:
        """Return whether this process runs a batch."""
        return number % self.size == self.rank

    def ends_round(self, number: int) -> bool:
        """Return whether a batch is the last one of a round."""
        return number % self.size == self.size - 1

    def barrier(self, finished: bool = False, error: Exception | None = None) -> None:
        """Wait until all processes call this method.

        Args:
            finished: Whether this process has reached the end of the text.
            error: The error that ends this process, or None.

        Raises:
            RocrError: A process failed, is lost, or has read less text than the others.
        """
        if self.size == 1:
            return
        finished_count, failed_count = self._sum(torch.tensor([finished, error is not None])).tolist()
        if failed_count:
            self._raise_first(self.gather(_as_message(error)), error)
        if finished_count not in (0, self.size):
            raise _as_broadcast(
                InputError(f"{self._name()} did not read as much text as the others: give all of them the same text.")
            )

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Run a step in all processes; if it fails in one of them, all of them raise an error.

        Raises:
            OtherRankError: The step failed in another process.
        """
        try:
            yield
        except Exception as caught:
            self.broadcast_error(caught)
            raise
        self.barrier()

    def broadcast_error(self, error: BaseException) -> None:
        """Send an error of this process to the others, unless they have it or the process is interrupted."""
        known = getattr(error, "is_broadcast", False) or self.lost
        if self.size > 1 and isinstance(error, Exception) and not known:
            with suppress(RocrError):
                self.barrier(error=error)

    def check_same(self, what: str, value: Any) -> None:
        """Raise InputError, in all processes, unless they have the same value.

        Args:
            what: The name of the value in the message.
            value: The value of this process.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise _as_broadcast(
                InputError(f"The {self.size} processes have different {what}: give all of them the same.")
            )

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._detecting_loss():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Return the value of process 0, in all processes."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with self._detecting_loss():
            dist.broadcast_object_list(values, src=0)
        first: T = values[0]
        return first

    def sum_lower_triangle(self, total: Tensor) -> None:
        """Replace the lower triangle of a matrix by its sum over all processes.

        The sum is computed in float64, where the order of float32 terms hardly matters, and rounded once.

        Args:
            total: (d, d) float32. Its upper triangle is undefined afterwards.
        """
        if self.size == 1:
            return
        rows = max(1, BLOCK_ELEMENTS // max(1, len(total)))
        for start in range(0, len(total), rows):
            block = total[start : start + rows, : start + rows]
            block.copy_(self._sum(block))

    def sum_layer(self, sums: LayerSums) -> None:
        """Replace the sums of a layer by their sums over all processes; see `sum_lower_triangle`."""
        for total in sums.matrices:
            self.sum_lower_triangle(total)
        if sums.routed is not None and self.size > 1:
            sums.routed.copy_(self._sum(sums.routed))

    def checkpoint(self, path: str | os.PathLike[str] | None) -> Path | None:
        """Return the path of this process's own checkpoint, for a collection with the checkpoint `path`.

        Raises:
            InputError: There are checkpoints of a collection by another number of processes.
        """
        if path is None:
            return None
        path = Path(path)
        own = path if self.size == 1 else path.with_name(f"{path.name}.{self.rank}-of-{self.size}")
        pattern = re.compile(re.escape(path.name) + r"(?:\.\d+-of-(\d+))?")
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        for name, match in ((name, pattern.fullmatch(name)) for name in sorted(names)):
            size = int(match[1] or 1) if match else self.size
            if size != self.size:
                raise InputError(
                    f"{path.with_name(name)} is the checkpoint of an interrupted collection by {_processes(size)}, but "
                    f"this one has {self.size}: continue with {size}, or delete the file."
                )
        return own

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, in float64 or int64."""
        wide = torch.float64 if values.is_floating_point() else torch.int64
        found = values.to(_device()).to(wide).contiguous()
        with self._detecting_loss():
            dist.all_reduce(found)
        return found

    @contextmanager
    def _detecting_loss(self) -> Iterator[None]:
        """Turn the failure of a collective operation into a RocrError."""
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            raise RocrError(
                f"{self._name()} cannot reach another process, which has ended or hangs. Start all processes again: "
                "with a checkpoint, they resume the collection."
            ) from error

    def _raise_first(self, messages: list[tuple[str, int] | None], error: Exception | None) -> None:
        """Raise the error of the process with the lowest rank that has one."""
        if isinstance(error, RocrError):
            _as_broadcast(error)
        for rank, message in enumerate(messages):
            if message is not None:
                sentence, exit_code = message
                raise OtherRankError(f"Process {rank} of {self.size} stopped: {sentence}", exit_code)

    def _name(self) -> str:
        return f"Process {self.rank} of {self.size}"


def _as_broadcast(error: RocrError) -> RocrError:
    """Mark an error as one that all processes have."""
    error.is_broadcast = True
    return error


def _as_message(error: Exception | None) -> tuple[str, int] | None:
    if error is None or isinstance(error, RocrError):
        return None if error is None else (str(error), error.exit_code)
    return f"{type(error).__name__}: {error}", RocrError.exit_code


def _processes(size: int) -> str:
    return "one process" if size == 1 else f"{size} processes"


def _device() -> torch.device:
    """Return the device for tensors of collective operations: the CPU if the group's backend supports it."""
    if "nccl" in dist.get_backend_config() and "cpu" not in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
