"""Which files of a model's folder an edited copy has too, and how they get there: as hard links, or copied.

A copy has holes where the first file has them, so that a sparse file takes no more room than before.
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
MAX_CARRIED_BYTES = 2 * 2**30
"""A file that holds no weights and is larger is refused: the largest tokenizers have some 50 MB."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz")
_NOT_CARRIED = (*WEIGHTS, *(f"{ending}.index.json" for ending in WEIGHTS))
_OWN_FILES = ("report.json", "README.md", INDEX_FILE)
_OWN_FOLDERS = ("originals", "lora")
_NO_DATA, _UNKNOWN = (errno.ENXIO,), (errno.EINVAL, errno.EOPNOTSUPP)


def carried_files(folder: Path) -> list[Path]:
    """Files of a model's folder that an edited copy of it has too, besides weights and their index.

    Those of folders below it count, such as further chat templates, but for folders whose names begin with a dot and
    those that rocr writes itself.

    Raises:
        InputError: a file is larger than any such file can be, or a link leads out of the folder.
    """
    found = [path for path in _files_below(folder) if not path.name.endswith(_NOT_CARRIED)]
    carried = [path for path in found if path.parent != folder or path.name not in _OWN_FILES]
    for path in carried:
        check_inside(folder, path)
        check_size(path, MAX_CARRIED_BYTES)
    return carried


def check_carried(source: ModelSource) -> None:
    """Refuse a model's folder that cannot be carried along, before anything of it is loaded; see `carried_files`."""
    if source.checkpoint_folder is not None:
        carried_files(source.checkpoint_folder)


def check_size(path: Path, limit: int) -> None:
    """Refuse a file that would be copied and is too large, whatever room it takes on the disk.

    Raises:
        InputError: names the file and the limit.
    """
    size = path.stat().st_size
    if size > limit:
        raise InputError(
            f"{path} would be copied to the output and claims {size:,} bytes; the limit for a file that is not among "
            f"the model's weights is {limit:,}. Move it out of the folder."
        )


def other_weights(folder: Path, kept: Sequence[str]) -> list[str]:
    """Files with weights that are not among those kept, by their paths in the folder; none is opened."""
    names = (path.relative_to(folder).as_posix() for path in _files_below(folder) if path.name.endswith(WEIGHTS))
    return [name for name in names if name not in kept]


def can_link(file: Path, out: Path) -> bool:
    """Whether a hard link to a file can be made in a folder."""
    probe = out / f".link-{os.getpid()}"
    try:
        os.link(os.path.realpath(file), probe)
    except OSError:
        return False
    probe.unlink()
    return True


def may_link(folder: Path, out: Path | None) -> bool:
    """Whether hard links from a folder to an output that is not there yet are to be expected."""
    parent = Path(os.path.abspath(out or ".")).parent
    return parent.is_dir() and os.stat(folder).st_dev == os.stat(parent).st_dev


def bytes_to_copy(files: Sequence[Path], out: Path) -> int:
    """Bytes that `link_or_copy` puts onto the disk for files of one folder."""
    return sum(file.stat().st_size for file in files) if files and not can_link(files[0], out) else 0


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link to a file, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = Path(os.path.realpath(source))
    try:
        os.link(real, target)
    except OSError:
        copy_file(real, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file to a new one.

    Raises:
        OSError: the system refuses, or the file becomes shorter meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as old, target.open("xb") as new:
        size = os.fstat(old.fileno()).st_size
        copy_range(old, new, 0, size)
        end_at(old, new, size)


def copy_range(old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    """Copy the bytes from `start` to `end` to the same place of another file, and leave holes out.

    Args:
        old: open for reading without a buffer.
        new: open for writing.
        start: offset of the first byte.
        end: offset behind the last one.
    """
    for first, last in _extents(old.fileno(), start, end):
        old.seek(first)
        new.seek(first)
        while first < last:
            block = old.read(min(last - first, BLOCK))
            if not block:
                raise OSError("the file became shorter while it was read")
            new.write(block)
            first += len(block)


def end_at(old: BinaryIO, new: BinaryIO, size: int) -> None:
    """Give a copy its size, which a hole at the end does not give it."""
    if os.fstat(old.fileno()).st_size < size:
        raise OSError("the file became shorter while it was read")
    new.flush()
    new.truncate(size)


def _extents(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that hold data; the whole range where the system does not tell."""
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
    """Plain files in a model's folder and below it; no link to a folder is followed."""
    for parent, folders, names in os.walk(folder):
        inside = Path(parent) != folder
        folders[:] = sorted(n for n in folders if not n.startswith(".") and (inside or n not in _OWN_FOLDERS))
        yield from (path for path in (Path(parent, name) for name in sorted(names)) if path.is_file())
