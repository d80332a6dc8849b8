"""Write an edited copy of a model's folder, in which only the bytes of the edited tensors differ.

Weight files without an edited tensor become hard links, or copies if the file system does not support links, and are
not parsed. Other weight files are streamed to new files with the edited tensors replaced. The model's own files are not
changed.
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
    CONFIG_FILE,
    bytes_to_copy,
    carried_files,
    copy_file,
    copy_range,
    end_at,
    link_or_copy,
    other_weights,
)
from rocr.export.replacing import Replacements
from rocr.io.disk_space import check_space
from rocr.io.json_values import parse_json
from rocr.io.safetensors_layout import StoredTensor, read_layout
from rocr.io.tensors import read_header
from rocr.model.check_folder import INDEX_FILE
from rocr.model.weight_files import WeightFiles

ADAPTER_FILE = "adapter_model.safetensors"


def rewrite_model(
    files: WeightFiles,
    changes: Mapping[str, Tensor],
    out: Path,
    beside: Sequence[str] = (),
    replaced: Replacements | None = None,
) -> list[str]:
    """Write a copy of a model's folder with some tensors changed into a folder that exists.

    Args:
        files: The weight files of the model.
        changes: New values of tensors by their names in the files, with the stored dtype and shape.
        out: The folder to write to.
        beside: Weight files of the folder that the model does not load and the copy also holds; see `files_beside`.
        replaced: Tensors that take the place of others, with their own names, dtypes and shapes; None for none.

    Returns:
        Names of the rewritten weight files. The others are links or copies.

    Raises:
        InputError: A tensor is missing or has another dtype or shape, or there is too little free disk space.
        RocrError: Writing fails.
    """
    places = {name: files.find(name) for name in changes}
    for name, place in places.items():
        values = changes[name]
        if values.dtype != place.dtype or tuple(values.shape) != place.shape:
            raise InputError(
                f"{name} is stored as {place.dtype} of shape {place.shape}, but was edited as {values.dtype} of shape "
                f"{tuple(values.shape)}. Load the model from this folder and edit it again."
            )
    replaced = replaced or Replacements()
    rewritten = sorted({*(files.file_of[name] for name in changes), *replaced.files})
    linked = [name for name in [*files.files, *beside] if name not in rewritten]
    carried = carried_files(files.folder)
    try:
        written = [*(files.folder / name for name in rewritten), *carried]
        copied = bytes_to_copy([files.folder / name for name in linked], out)
        check_space(out, copied + sum(path.stat().st_size for path in written) + replaced.nbytes)
        for file in rewritten:
            inside = [(place, changes[name]) for name, place in places.items() if files.file_of[name] == file]
            if file in replaced.files:
                replaced.write(files.folder / file, inside, out / file)
            else:
                _stream(files.folder / file, inside, out / file)
        for file in linked:
            link_or_copy(files.folder / file, out / file)
        for path in carried:
            if path == files.folder / CONFIG_FILE and replaced.config is not None:
                (out / CONFIG_FILE).write_bytes(replaced.config)
            else:
                copy_file(path, out / path.relative_to(files.folder))
        _write_index(files, out, replaced)
    except OSError as error:
        raise RocrError(f"{out} cannot be written: {error.strerror or error}.") from error
    return rewritten


def files_beside(files: WeightFiles, edited: Collection[tuple[int, ...]]) -> list[str]:
    """Return the safetensors files that the model does not load and an edited copy also holds, such as a projector.

    A file that could be another copy of the unlearned weights is left out: one with a tensor that has the name of a
    tensor of the model, or the shape of an edited weight or its transpose. Files that are larger than the model, or
    cannot be read, are left out too.

    Args:
        files: The weight files of the model.
        edited: Shapes of the edited weights.

    Returns:
        Names of the files.
    """
    shapes = {tuple(sorted(shape)) for shape in edited}
    found = []
    for name in other_weights(files.folder, files.files):
        path = files.folder / name
        if path.parent != files.folder or path.suffix != ".safetensors" or path.name == ADAPTER_FILE:
            continue
        if path.stat().st_size <= files.size and not _is_written_by_rocr(path) and _is_unrelated(path, files, shapes):
            found.append(name)
    return found


def _is_written_by_rocr(path: Path) -> bool:
    """Return whether a safetensors file is an edit or statistics."""
    try:
        read_header(path)
    except InputError:
        return False
    return True


def _is_unrelated(path: Path, files: WeightFiles, shapes: Collection[tuple[int, ...]]) -> bool:
    """Return whether no tensor of a file has the name of one of the model, or one of the sorted shapes."""
    try:
        layout = read_layout(path)
    except InputError:
        return False
    return not any(name in files.file_of or tuple(sorted(place.shape)) in shapes for name, place in layout.items())


def _stream(source: Path, changed: list[tuple[StoredTensor, Tensor]], target: Path) -> None:
    """Copy a file with the bytes of some tensors replaced."""
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


def _write_index(files: WeightFiles, out: Path, replaced: Replacements) -> None:
    """Write an index, even for a single weight file, since loaders without one load the edit file as weights."""
    if replaced.index is not None:
        (out / INDEX_FILE).write_bytes(replaced.index)
        return
    if replaced.files:
        size = sum((out / name).stat().st_size for name in files.files)
        _write_json({"metadata": {"total_size": size}, "weight_map": replaced.weight_map(files.file_of)}, out)
        return
    if files.index is not None:
        copy_file(files.folder / files.index, out / INDEX_FILE)
        return
    place = files.folder / INDEX_FILE
    if place.exists() and set(parse_json(place.read_bytes())["weight_map"].values()) == set(files.files):
        copy_file(place, out / INDEX_FILE)
        return
    _write_json({"metadata": {"total_size": files.size}, "weight_map": files.file_of}, out)


def _write_json(index: dict[str, Any], out: Path) -> None:
    (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
