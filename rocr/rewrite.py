"""Write an edited copy of a model's folder by rewriting only the tensors that were edited.

Files without an edited tensor become hard links, or copies where the file system has none, and are never parsed.
A file with one is streamed to a new file: every byte but the tensor's own is the same. Nothing is changed in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError, RocrError
from rocr.model_folder import INDEX_FILE, SINGLE_FILE
from rocr.shards import StoredTensor, WeightFiles
from rocr.space import check_space

BLOCK = 2**20
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz")
_OWN_FILES = ("report.json", "README.md", INDEX_FILE)


def rewrite_model(files: WeightFiles, changes: Mapping[str, Tensor], out: Path) -> list[str]:
    """Write a folder's model with some tensors changed into a folder that exists.

    Args:
        files: the first folder's weights.
        changes: new values of tensors by their names in the files; dtype and shape as stored.
        out: the folder to write to.

    Returns:
        Names of the weight files that were written anew; the others are links or copies.

    Raises:
        InputError: a tensor is not there, or of another dtype or shape; or the disk is too small.
        RocrError: the disk refuses.
    """
    places = {name: files.find(name) for name in changes}
    for name, place in places.items():
        values = changes[name]
        if values.dtype != place.dtype or tuple(values.shape) != place.shape:
            raise InputError(
                f"{name} is stored as {place.dtype} of shape {place.shape}, but was edited as {values.dtype} of shape "
                f"{tuple(values.shape)}."
            )
    rewritten = sorted({files.file_of[name] for name in changes})
    try:
        check_space(out, bytes_written(files, rewritten, out))
        for file in files.files:
            if file in rewritten:
                inside = [(place, changes[name]) for name, place in places.items() if files.file_of[name] == file]
                _stream(files.folder / file, inside, out / file)
            else:
                link_or_copy(files.folder / file, out / file)
        _copy_others(files.folder, out)
        _write_index(files, out)
    except OSError as error:
        raise RocrError(f"{out} cannot be written: {error.strerror or error}.") from error
    return rewritten


def bytes_written(files: WeightFiles, rewritten: list[str], out: Path) -> int:
    """Bytes that `rewrite_model` puts onto the disk."""
    linked = can_link(files.folder / files.files[0], out)
    names = rewritten if linked else files.files
    return sum((files.folder / name).stat().st_size for name in names)


def can_link(file: Path, out: Path) -> bool:
    """Whether a hard link to a file can be made in a folder."""
    probe = out / f".link-{os.getpid()}"
    try:
        os.link(os.path.realpath(file), probe)
    except OSError:
        return False
    probe.unlink()
    return True


def bytes_to_copy(files: Sequence[Path], out: Path) -> int:
    """Bytes that `link_or_copy` puts onto the disk for files of one folder."""
    return sum(file.stat().st_size for file in files) if files and not can_link(files[0], out) else 0


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link to a file, or a copy where the file system has none."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def _stream(source: Path, changed: list[tuple[StoredTensor, Tensor]], target: Path) -> None:
    """Copy a file, with the bytes of some tensors replaced on the way."""
    with source.open("rb") as old, target.open("xb") as new:
        for place, values in sorted(changed, key=lambda pair: pair[0].start):
            _copy(old, new, place.start - old.tell())
            flat = values.detach().cpu().contiguous().reshape(-1)
            buffer: Any = flat.view(torch.uint8).numpy()
            new.write(memoryview(buffer))
            old.seek(place.size, os.SEEK_CUR)
        _copy(old, new, os.fstat(old.fileno()).st_size - old.tell())


def _copy(old: Any, new: Any, count: int) -> None:
    while count > 0:
        block = old.read(min(count, BLOCK))
        if not block:
            raise OSError("the file became shorter while it was read")
        new.write(block)
        count -= len(block)


def _copy_others(folder: Path, out: Path) -> None:
    """Copy configuration and tokenizer; no other weights, which would hold what was unlearned."""
    for path in carried_files(folder):
        shutil.copyfile(path, out / path.name)


def carried_files(folder: Path) -> list[Path]:
    """Files of a model's folder that an edited copy of it has too, besides weights and their index."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.endswith(_OTHER_WEIGHTS) and path.name not in _OWN_FILES
    ]


def _write_index(files: WeightFiles, out: Path) -> None:
    """Name the weight files in an index, also a single one: loaders that glob would take the edit for weights."""
    index = files.folder / INDEX_FILE
    if index.exists():
        shutil.copyfile(index, out / INDEX_FILE)
    else:
        size = (files.folder / SINGLE_FILE).stat().st_size
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": files.file_of}, indent=2)
        (out / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
