"""The processes that collect statistics together: torch.distributed, where the caller has initialised it.

They meet after every round of batches, one batch each. A meeting says whether all are still there, so that no
process waits for a lost one longer than a batch takes, however much of its own share is done already.
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

T = TypeVar("T")
BLOCK_NUMBERS = 2**23
"""Numbers of a sum that are added up at once: 64 MiB in float64."""


class OtherRankError(RocrError):
    """Another process has ended the collection of all."""

    is_broadcast = True

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass
class Ranks:
    """This process among those that work together; by itself where there are no others.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        lost: whether one of them cannot be reached any more.
    """

    rank: int = 0
    size: int = 1
    lost: bool = False

    @classmethod
    def of_group(cls) -> Ranks:
        """The processes of torch's default group, where there is one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self) -> dict[str, Any]:
        """What tells a process's share from the whole and from other shares."""
        return {"share": [self.rank, self.size]} if self.size > 1 else {}

    def owns(self, number: int) -> bool:
        """Whether a batch is this process's to run."""
        return number % self.size == self.rank

    def ends_round(self, number: int) -> bool:
        """Whether a batch is the last one of a round."""
        return number % self.size == self.size - 1

    def meet(self, finished: bool = False, error: Exception | None = None) -> None:
        """Wait until all have come here.

        Args:
            finished: whether this process has come to the end of the text.
            error: what ends this process.

        Raises:
            RocrError: one of them failed (with its sentence), was lost, or has another text.
        """
        if self.size == 1:
            return
        finished_count, failed_count = self._sum(torch.tensor([finished, error is not None])).tolist()
        if failed_count:
            self._raise_first(self.gather(_as_message(error)), error)
        if finished_count not in (0, self.size):
            raise _told(InputError(f"{self._name()} did not read as much text as the others: give all the same."))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that all take; where it fails in one of them, all raise.

        Raises:
            OtherRankError: another process failed.
        """
        try:
            yield
        except Exception as caught:
            self.tell(caught)
            raise
        self.meet()

    def tell(self, error: BaseException) -> None:
        """Let the others know that this process fails, unless they know or it is being stopped from outside."""
        known = getattr(error, "is_broadcast", False) or self.lost
        if self.size > 1 and isinstance(error, Exception) and not known:
            with suppress(RocrError):
                self.meet(error=error)

    def check_same(self, what: str, value: Any) -> None:
        """Refuse to go on where the processes differ in what must be the same.

        Raises:
            InputError: they differ.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise _told(InputError(f"The {self.size} processes have different {what}: give all of them the same."))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._reaching():
            dist.all_gather_object(values, value)
        return values

    def of_first(self, value: T) -> T:
        """Process 0's value, in all of them."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with self._reaching():
            dist.broadcast_object_list(values, src=0)
        first: T = values[0]
        return first

    def add_up(self, total: Tensor) -> None:
        """Replace the lower triangle of a matrix by its sum over all processes, which is rounded once.

        Sums of float32 are all but exact in float64, so that the order of the processes leaves no trace.

        Args:
            total: (d, d) float32; its upper triangle is undefined afterwards.
        """
        if self.size == 1:
            return
        rows = max(1, BLOCK_NUMBERS // max(1, len(total)))
        for start in range(0, len(total), rows):
            block = total[start : start + rows, : start + rows]
            block.copy_(self._sum(block))

    def checkpoint(self, path: str | os.PathLike[str] | None) -> Path | None:
        """The file of this process's own state, where that of a collection is to lie at `path`.

        Raises:
            InputError: states lie there of a collection by another number of processes.
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
                    f"{path.with_name(name)} is the state of an interrupted collection by {_processes(size)}, and this "
                    f"one has {self.size}: go on with {size}, or delete it."
                )
        return own

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in float64 or int64."""
        wide = torch.float64 if values.is_floating_point() else torch.int64
        found = values.to(_device()).to(wide).contiguous()
        with self._reaching():
            dist.all_reduce(found)
        return found

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            raise RocrError(
                f"{self._name()} cannot reach another one, which has ended or hangs. Start all again: with a "
                "checkpoint they go on where they were."
            ) from error

    def _raise_first(self, messages: list[tuple[str, int] | None], error: Exception | None) -> None:
        if isinstance(error, RocrError):
            _told(error)
        for rank, message in enumerate(messages):
            if message is not None:
                sentence, exit_code = message
                raise OtherRankError(f"Process {rank} of {self.size} stopped: {sentence}", exit_code)

    def _name(self) -> str:
        return f"Process {self.rank} of {self.size}"


def _told(error: RocrError) -> RocrError:
    error.is_broadcast = True
    return error


def _as_message(error: Exception | None) -> tuple[str, int] | None:
    if error is None or isinstance(error, RocrError):
        return None if error is None else (str(error), error.exit_code)
    return f"{type(error).__name__}: {error}", RocrError.exit_code


def _processes(size: int) -> str:
    return "one process" if size == 1 else f"{size} processes"


def _device() -> torch.device:
    """Where the group's backend wants its tensors: on the CPU wherever it takes them there."""
    if "nccl" in dist.get_backend_config() and "cpu" not in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
