"""Lock an output for one process with a file beside it that names the process."""

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
        pid: The process id.
        host: The name of the machine.
        started: The start time of the process in clock ticks since the machine was booted, which distinguishes it
            from a later process with the same id; None if the system does not report it.
    """

    pid: int
    host: str
    started: int | None

    @classmethod
    def of_this_process(cls) -> Owner:
        """Return the owner that describes this process."""
        return cls(os.getpid(), socket.gethostname(), _start_time(os.getpid()))

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended. A process on another machine is assumed to be running."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # the process exists and belongs to another user
            return False
        return self.started is not None and _start_time(self.pid) != self.started


@contextmanager
def locked(output: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock file `<output>.lock` inside the context, so that no second run writes the same output.

    A lock whose process has ended, for example by being killed, is taken over.

    Raises:
        InputError: Another process holds the lock.
    """
    real = Path(os.path.realpath(output))
    lock = real.with_name(f"{real.name}.lock")
    mine = json.dumps(asdict(Owner.of_this_process()))
    held, not_removed = False, list[Path]()
    try:
        with postponed_signals():
            held = _acquire(lock, mine, output, not_removed)
        yield
    finally:
        with postponed_signals():
            # A lock that cannot be removed is taken over by the next run, since this process has ended by then.
            for path in (*not_removed, *([lock] if held else [])):
                _remove(path, [])


def _acquire(lock: Path, mine: str, output: str | os.PathLike[str], not_removed: list[Path]) -> bool:
    """Create the lock file; return False if the file system does not allow it.

    Args:
        lock: The path of the lock file.
        mine: The contents of the lock file.
        output: The output that is locked.
        not_removed: Receives the temporary files that could not be removed.

    Raises:
        InputError: Another process holds the lock.
    """
    for _ in range(_ATTEMPTS):
        made = _create(lock, mine, not_removed)
        if made is not False:
            return made is True
        found = _read(lock)
        if found is None:
            continue  # released in the meantime
        owner = _parse(found)
        if owner is None or not owner.is_gone():
            who = f"process {owner.pid} on {owner.host}" if owner else "another process"
            raise InputError(
                f"The output {output} is being made by {who}. Choose another name, or, if that process has ended, "
                f"delete {lock}."
            )
        _remove_stale(lock, found, not_removed)
    raise InputError(f"Several processes try to write the output {output} at once; choose another name.")


def _create(lock: Path, mine: str, not_removed: list[Path]) -> bool | None:
    """Create the lock file with its contents in one step.

    Returns:
        True if it was created, False if it exists, None if the file system does not allow it.
    """
    draft = lock.with_name(f"{lock.name}-{secrets.token_hex(4)}")
    try:
        draft.write_text(mine, encoding="utf-8")
        os.link(draft, lock)
    except FileExistsError:
        return False
    except OSError:
        # No hard links or no permission to write: writing the output raises the error, if there is one.
        return False if lock.exists() else None
    finally:
        _remove(draft, not_removed)
    return True


def _remove_stale(lock: Path, stale: str, not_removed: list[Path]) -> None:
    """Remove a stale lock file, but restore one that another process has created in its place."""
    aside = lock.with_name(f"{lock.name}-{secrets.token_hex(4)}")
    with suppress(OSError):
        os.rename(lock, aside)
        if _read(aside) != stale:
            os.link(aside, lock)
    _remove(aside, not_removed)


def _remove(path: Path, not_removed: list[Path]) -> None:
    """Remove a file if it exists; add it to `not_removed` if that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        not_removed.append(path)


def _read(lock: Path) -> str | None:
    """Read a lock file: None if it does not exist, an empty text if it cannot be read."""
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
        # The process name in parentheses may hold spaces. After it come the state and, 19 fields later, the start time.
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])  # Z and X: dead, but the parent has not waited for it yet
    except (OSError, ValueError, IndexError):
        return None
