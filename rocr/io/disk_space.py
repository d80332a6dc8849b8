"""Check the free space of a disk before files are written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rocr.errors import InputError

SPARE_BYTES = 16 * 2**20


def check_space(place: str | os.PathLike[str], needed: int) -> None:
    """Raise InputError unless a disk has enough free space.

    Args:
        place: A path on the disk, which may not exist yet.
        needed: The bytes that will be written; `SPARE_BYTES` are added.

    Raises:
        InputError: The disk has less free space; the message names both sizes.
    """
    free = free_space(place)
    if free is not None and needed + SPARE_BYTES > free:
        raise InputError(
            f"The disk of {place} has {free / 2**20:,.0f} MiB free, but {(needed + SPARE_BYTES) / 2**20:,.0f} MiB are "
            "needed; nothing was written. Free some space, or write to another disk."
        )


def free_space(place: str | os.PathLike[str]) -> int | None:
    """Return the free bytes on the disk of a path; None if the system does not report them."""
    path = Path(os.path.abspath(place))
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
