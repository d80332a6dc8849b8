"""Choose the files of a model's folder that an edited copy also holds, and link or copy them.

A copy of a sparse file has the same holes, so that it takes no more disk space than the original.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from rocr.errors import InputError
from rocr.model.check_folder import INDEX_FILE, check_inside
from rocr.model.load import ModelSource

BLOCK = 2**20
REPORT_FILE, CARD_FILE, EDIT_FILE, SUMS_FILE = "report.json", "README.md", "edit.safetensors", "SHA256SUMS"
CONFIG_FILE = "config.json"
SETTINGS_FILE = "edit.toml"
"""The options of the run that wrote an output, for `rocr unlearn --config`."""
REPLACED_FILE = "replaced.safetensors"
"""The quantised tensors that an edited weight replaces, from which `rocr revert` restores the files."""
ORIGINALS_FOLDER, ADAPTER_FOLDER = "originals", "lora"
MAX_CARRIED_BYTES = 2 * 2**30
"""Largest size of a file without weights that is copied. The largest tokenizers have about 50 MB."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz")
_NOT_CARRIED = (*WEIGHTS, *(f"{ending}.index.json" for ending in WEIGHTS))
_WRITTEN_FILES = (REPORT_FILE, CARD_FILE, SUMS_FILE, INDEX_FILE, SETTINGS_FILE)
_WRITTEN_FOLDERS = (ORIGINALS_FOLDER, ADAPTER_FOLDER)
_NO_DATA, _UNKNOWN = (errno.ENXIO,), (errno.EINVAL, errno.EOPNOTSUPP)


def carried_files(folder: Path) -> list[Path]:
    """Return the files of a model's folder that an edited copy also holds, besides weights and their index.

    Files in subfolders are included, such as further chat templates. Folders whose names begin with a dot, and the
    files and folders that rocr itself writes, are not.

    Raises:
        InputError: A file is too large, or a link leads out of the folder.
    """
    found = [path for path in _files_below(folder) if not path.name.endswith(_NOT_CARRIED)]
    carried = [path for path in found if path.parent != folder or path.name not in _WRITTEN_FILES]
    for path in carried:
        check_inside(folder, path)
        check_size(path, MAX_CARRIED_BYTES)
    return carried


def check_carried(source: ModelSource) -> None:
    """Raise InputError if files of a model's folder cannot be copied; see `carried_files`. Nothing is loaded."""
    if source.folder is not None and source.gguf is None:
        carried_files(source.folder)


def check_size(path: Path, limit: int) -> None:
    """Raise InputError if the size of a file, holes included, exceeds a limit in bytes."""
    size = path.stat().st_size
    if size > limit:
        raise InputError(
            f"{path} would be copied to the output and has {size:,} bytes; the limit for a file that is not among the "
            f"model's weights is {limit:,}. Move it out of the folder."
        )


def other_weights(folder: Path, kept: Sequence[str]) -> list[str]:
    """Return the files with weights, except those in `kept`, as paths relative to the folder. No file is opened."""
    names = (path.relative_to(folder).as_posix() for path in _files_below(folder) if path.name.endswith(WEIGHTS))
    return [name for name in names if name not in kept]


def can_link(file: Path, out: Path) -> bool:
    """Return whether a hard link to a file can be made in a folder."""
    probe = out / f".link-{os.getpid()}"
    try:
        os.link(os.path.realpath(file), probe)
    except OSError:
        return False
    probe.unlink()
    return True


def may_link(folder: Path, out: Path | None) -> bool:
    """Return whether hard links from a folder to an output that does not exist yet are expected to work."""
    parent = Path(os.path.abspath(out or ".")).parent
    return parent.is_dir() and os.stat(folder).st_dev == os.stat(parent).st_dev


def bytes_to_copy(files: Sequence[Path], out: Path) -> int:
    """Return the number of bytes that `link_or_copy` writes for files of one folder."""
    return sum(file.stat().st_size for file in files) if files and not can_link(files[0], out) else 0


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link to a file, or a copy if the file system does not support links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = Path(os.path.realpath(source))
    try:
        os.link(real, target)
    except OSError:
        copy_file(real, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file to a new one.

    Raises:
        OSError: A read or write fails, or the file shrinks during the copy.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as old, target.open("xb") as new:
        size = os.fstat(old.fileno()).st_size
        copy_range(old, new, 0, size)
        end_at(old, new, size)


def copy_range(old: BinaryIO, new: BinaryIO, start: int, end: int, moved: int = 0) -> None:
    """Copy the bytes from `start` to `end` to another file, and skip holes.

    Args:
        old: The source, open for reading without a buffer.
        new: The target, open for writing.
        start: Offset of the first byte.
        end: Offset after the last byte.
        moved: What is added to the offsets in the other file.
    """
    for first, last in _extents(old.fileno(), start, end):
        old.seek(first)
        new.seek(first + moved)
        while first < last:
            block = old.read(min(last - first, BLOCK))
            if not block:
                raise OSError("the file shrank while it was read")
            new.write(block)
            first += len(block)


def end_at(old: BinaryIO, new: BinaryIO, size: int, new_size: int | None = None) -> None:
    """Set the size of a copy, since a hole at the end is not written.

    Args:
        old: The source, open for reading.
        new: The target, open for writing.
        size: Size of the source when the copy began.
        new_size: Size of the target. None is `size`.
    """
    if os.fstat(old.fileno()).st_size < size:
        raise OSError("the file shrank while it was read")
    new.flush()
    new.truncate(size if new_size is None else new_size)


def _extents(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that hold data, or the whole range if the system does not report holes."""
    if not hasattr(os, "SEEK_DATA"):
        yield start, end
        return
    while start < end:
        try:
            first = os.lseek(descriptor, start, os.SEEK_DATA)
            last = os.lseek(descriptor, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno in _UNKNOWN:
                yield start, end
            elif error.errno not in _NO_DATA:
                raise
            return
        if first < end:
            yield first, min(last, end)
        start = last


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the regular files in a model's folder and below it. Links to folders are not followed."""
    for parent, folders, names in os.walk(folder):
        inside = Path(parent) != folder
        folders[:] = sorted(n for n in folders if not n.startswith(".") and (inside or n not in _WRITTEN_FOLDERS))
        yield from (path for path in (Path(parent, name) for name in sorted(names)) if path.is_file())
