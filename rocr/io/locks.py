"""One run at a time for each output: a file beside it says which process is making it."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rocr.errors import InputError
from rocr.io.signals import postponed_signals

_ATTEMPTS = 5


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        pid: its number.
        host: the machine it runs on.
        started: when it began, in clock ticks since the machine's own start, which tells it from a later process
            of the same number; None where the system does not say.
    """

    pid: int
    host: str
    started: int | None

    @classmethod
    def of_this_process(cls) -> Owner:
        """The owner that this process is."""
        return cls(os.getpid(), socket.gethostname(), _start_time(os.getpid()))

    def is_gone(self) -> bool:
        """Whether the process has surely ended; of another machine's, this cannot be known."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it is there and is somebody else's
            return False
        return self.started is not None and _start_time(self.pid) != self.started


@contextmanager
def locked(output: str | os.PathLike[str]) -> Iterator[None]:
    """Hold `<output>.lock` inside the context, so that no second run makes the same output.

    A lock whose process has ended, killed for example, is taken over.

    Raises:
        InputError: another process holds it.
    """
    real = Path(os.path.realpath(output))
    lock = real.with_name(f"{real.name}.lock")
    mine = json.dumps(asdict(Owner.of_this_process()))
    held, left = False, list[Path]()
    try:
        with postponed_signals():
            held = _acquire(lock, mine, output, left)
        yield
    finally:
        with postponed_signals():
            # While this process lives its lock is not taken over; one that cannot be removed is taken over later.
            for path in (*left, *([lock] if held else [])):
                _remove(path, [])


def _acquire(lock: Path, mine: str, output: str | os.PathLike[str], left: list[Path]) -> bool:
    """Whether there is a lock now, which is not so on a file system that can have none.

    Args:
        lock: the file.
        mine: what it is to say.
        output: what it is for.
        left: gets the files of other names that could not be removed.
    """
    for _ in range(_ATTEMPTS):
        made = _create(lock, mine, left)
        if made is not False:
            return made is True
        found = _read(lock)
        if found is None:
            continue  # given back meanwhile
        owner = _parse(found)
        if owner is None or not owner.is_gone():
            who = f"process {owner.pid} on {owner.host}" if owner else "another process"
            raise InputError(
                f"The output {output} is being made by {who}. Choose another name, or, if that process has ended, "
                f"delete {lock}."
            )
        _put_aside(lock, found, left)
    raise InputError(f"The output {output} is wanted by several processes at once; choose another name.")


def _create(lock: Path, mine: str, left: list[Path]) -> bool | None:
    """Make the lock with all that it says, in one step; False where there is one, None where none can be made."""
    draft = lock.with_name(f"{lock.name}-{secrets.token_hex(4)}")
    try:
        draft.write_text(mine, encoding="utf-8")
        os.link(draft, lock)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links, or one that cannot be written to: the output itself will say so.
        return False if lock.exists() else None
    finally:
        _remove(draft, left)
    return True


def _put_aside(lock: Path, stale: str, left: list[Path]) -> None:
    """Remove a stale lock, but never the fresh one of somebody who removed it first."""
    aside = lock.with_name(f"{lock.name}-{secrets.token_hex(4)}")
    with suppress(OSError):
        os.rename(lock, aside)
        if _read(aside) != stale:
            os.link(aside, lock)
    _remove(aside, left)


def _remove(path: Path, left: list[Path]) -> None:
    """Remove a file if it is there; what the disk refuses to remove now is noted."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        left.append(path)


def _read(lock: Path) -> str | None:
    try:
        return lock.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""


def _parse(text: str) -> Owner | None:
    try:
        values = json.loads(text)
        return Owner(int(values["pid"]), str(values["host"]), values["started"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _start_time(pid: int) -> int | None:
    try:
        # The name in parentheses may hold spaces; the state comes after it, and the start as the 19th after that.
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])  # dead, but not yet collected by its parent
    except (OSError, ValueError, IndexError):
        return None
