"""Read an untrusted file completely, up to a limit of bytes."""

from __future__ import annotations

import os
from pathlib import Path

from rocr.errors import InputError


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the bytes of a regular file. Pipes and devices, which may never end, are refused.

    Args:
        path: The path of the file.
        limit: The largest number of bytes to read.

    Raises:
        InputError: The file does not exist, is not a regular file, cannot be read, or has more than `limit` bytes.
    """
    place = Path(path)
    try:
        if not place.is_file():
            if place.is_dir():
                raise InputError(f"{path} is a folder; give a file.")
            raise InputError(f"{path} {'is not a regular file' if place.exists() else 'does not exist'}.")
        with place.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > limit:
        raise InputError(f"{path} is larger than {limit // 2**20} MiB, the limit for such a file.")
    return data
