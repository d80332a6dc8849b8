"""Room on a disk, looked at before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rocr.errors import InputError

SPARE_BYTES = 16 * 2**20


def check_space(place: str | os.PathLike[str], needed: int) -> None:
    """Refuse a disk that is too small.

    Args:
        place: a folder on it, or a path in one, which need not be there yet.
        needed: bytes that will be written; some are kept spare besides.

    Raises:
        InputError: the disk has less free space; says how much.
    """
    free = free_space(place)
    if free is not None and needed + SPARE_BYTES > free:
        raise InputError(
            f"The disk of {place} has {free / 2**20:,.0f} MiB free, but {(needed + SPARE_BYTES) / 2**20:,.0f} MiB are "
            "needed; nothing was written."
        )


def free_space(place: str | os.PathLike[str]) -> int | None:
    """Bytes free on the disk of a place; None where the system does not say."""
    path = Path(os.path.abspath(place))
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
