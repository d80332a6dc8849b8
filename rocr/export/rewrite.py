"""Write an edited copy of a model's folder by rewriting only the tensors that were edited.

Files without an edited tensor become hard links, or copies where the file system has none, and are never parsed.
A file with one is streamed to a new file: every byte but the tensor's own is the same. Nothing is changed in place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError, RocrError
from rocr.export.copying import (
    bytes_to_copy,
    carried_files,
    copy_file,
    copy_range,
    end_at,
    link_or_copy,
    other_weights,
)
from rocr.io.disk_space import check_space
from rocr.io.json_values import parse_json
from rocr.io.safetensors_layout import StoredTensor, read_layout
from rocr.io.tensors import read_header
from rocr.model.check_folder import INDEX_FILE
from rocr.model.weight_files import WeightFiles

ADAPTER_FILE = "adapter_model.safetensors"


def rewrite_model(
    files: WeightFiles, changes: Mapping[str, Tensor], out: Path, beside: Sequence[str] = ()
) -> list[str]:
    """Write a folder's model with some tensors changed into a folder that exists.

    Args:
        files: the first folder's weights.
        changes: new values of tensors by their names in the files; dtype and shape as stored.
        out: the folder to write to.
        beside: weight files of the folder that are no part of the model and are written too; see `files_beside`.

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
    linked = [name for name in [*files.files, *beside] if name not in rewritten]
    carried = carried_files(files.folder)
    try:
        copied = bytes_to_copy([files.folder / name for name in linked], out)
        check_space(out, copied + sum((files.folder / name).stat().st_size for name in rewritten) + _size(carried))
        for file in rewritten:
            inside = [(place, changes[name]) for name, place in places.items() if files.file_of[name] == file]
            _stream(files.folder / file, inside, out / file)
        for file in linked:
            link_or_copy(files.folder / file, out / file)
        for path in carried:
            copy_file(path, out / path.relative_to(files.folder))
        _write_index(files, out)
    except OSError as error:
        raise RocrError(f"{out} cannot be written: {error.strerror or error}.") from error
    return rewritten


def files_beside(files: WeightFiles, edited: Collection[tuple[int, ...]]) -> list[str]:
    """Safetensors files beside the model's that an edited copy has too, such as a projector or a head.

    Their tensors have other names than the model's, and none has the shape of an edited weight, stored as it is or
    transposed: such a file could be another copy of what was unlearned. It stays out, as everything does that is
    larger than the model itself or cannot be read.

    Args:
        files: the model's own.
        edited: shapes of the edited weights.
    """
    shapes = {tuple(sorted(shape)) for shape in edited}
    found = []
    for name in other_weights(files.folder, files.files):
        path = files.folder / name
        if path.parent != files.folder or path.suffix != ".safetensors" or path.name == ADAPTER_FILE:
            continue
        if path.stat().st_size <= files.size and not _is_of_rocr(path) and _is_apart(path, files, shapes):
            found.append(name)
    return found


def _is_of_rocr(path: Path) -> bool:
    try:
        read_header(path)
    except InputError:
        return False
    return True


def _is_apart(path: Path, files: WeightFiles, shapes: Collection[tuple[int, ...]]) -> bool:
    try:
        layout = read_layout(path)
    except InputError:
        return False
    return not any(name in files.file_of or tuple(sorted(place.shape)) in shapes for name, place in layout.items())


def _size(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _stream(source: Path, changed: list[tuple[StoredTensor, Tensor]], target: Path) -> None:
    """Copy a file, with the bytes of some tensors replaced on the way."""
    with source.open("rb", buffering=0) as old, target.open("xb") as new:
        size, done = os.fstat(old.fileno()).st_size, 0
        for place, values in sorted(changed, key=lambda pair: pair[0].start):
            copy_range(old, new, done, place.start)
            flat = values.detach().cpu().contiguous().reshape(-1)
            buffer: Any = flat.view(torch.uint8).numpy()
            new.seek(place.start)
            new.write(memoryview(buffer))
            done = place.start + place.size
        copy_range(old, new, done, size)
        end_at(old, new, size)


def _write_index(files: WeightFiles, out: Path) -> None:
    """Name the weight files in an index, also a single one: loaders that glob would take the edit for weights."""
    if files.index is not None:
        copy_file(files.folder / files.index, out / INDEX_FILE)
        return
    place = files.folder / INDEX_FILE
    if place.exists() and set(parse_json(place.read_bytes())["weight_map"].values()) == set(files.files):
        copy_file(place, out / INDEX_FILE)
        return
    index = {"metadata": {"total_size": files.size}, "weight_map": files.file_of}
    (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
