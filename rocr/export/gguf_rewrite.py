"""Write a copy of a GGUF file in which only some tensors differ.

Metadata, names, shapes, the order of tensors and the bytes of all other tensors, padding included, are those of the
file. If an edited tensor is written in another type, its type in the header and the offsets of the tensors after it
change.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from rocr.errors import RocrError
from rocr.export.copying import copy_range, end_at
from rocr.model.gguf_layout import GgufLayout, number_of_kind, size_of


@dataclass(frozen=True)
class NewTensor:
    """The new content of a tensor.

    Attributes:
        kind: The name of the type.
        data: (bytes,) uint8.
    """

    kind: str
    data: Tensor


def grown_size(layout: GgufLayout, kinds: Mapping[str, str]) -> int:
    """Return the size in bytes of a copy of a file with some tensors in other types.

    Args:
        layout: The file.
        kinds: The new type of each edited tensor by name.
    """
    grown = sum(
        _padded(size_of(layout.tensors[name].shape, kind), layout.alignment)
        - _padded(layout.tensors[name].size, layout.alignment)
        for name, kind in kinds.items()
    )
    return os.path.getsize(layout.path) + grown


def rewrite_gguf(layout: GgufLayout, changes: Mapping[str, NewTensor], out: Path) -> None:
    """Write a copy of a GGUF file with some tensors changed to a new file.

    Args:
        layout: The file.
        changes: The new content of tensors by name.
        out: The path of the new file.

    Raises:
        RocrError: Writing fails.
    """
    places = _places(layout, changes)
    try:
        with layout.path.open("rb", buffering=0) as old, out.open("xb") as new:
            size = os.fstat(old.fileno()).st_size
            copy_range(old, new, 0, layout.data_start)
            _write_infos(layout, changes, places, new)
            _write_data(layout, changes, places, old, new, size)
    except OSError as error:
        raise RocrError(f"{out} cannot be written: {error.strerror or error}.") from error


def _places(layout: GgufLayout, changes: Mapping[str, NewTensor]) -> dict[str, int]:
    """Return the offset of each tensor in the new file by its name."""
    places, moved = {}, 0
    for name, tensor in layout.tensors.items():
        places[name] = tensor.start + moved
        if name in changes:
            moved += _padded(len(changes[name].data), layout.alignment) - _padded(tensor.size, layout.alignment)
    return places


def _write_infos(
    layout: GgufLayout, changes: Mapping[str, NewTensor], places: Mapping[str, int], new: BinaryIO
) -> None:
    """Overwrite types and offsets in the header where they change."""
    for name, tensor in layout.tensors.items():
        if places[name] == tensor.start and name not in changes:
            continue
        kind = changes[name].kind if name in changes else tensor.kind
        new.seek(tensor.info)
        new.write(struct.pack("<IQ", number_of_kind(kind), places[name] - layout.data_start))


def _write_data(
    layout: GgufLayout,
    changes: Mapping[str, NewTensor],
    places: Mapping[str, int],
    old: BinaryIO,
    new: BinaryIO,
    size: int,
) -> None:
    """Write the data section: what lies between edited tensors is copied, and moved as far as these grew."""
    done, moved = layout.data_start, 0
    for name, tensor in layout.tensors.items():
        if name not in changes:
            continue
        copy_range(old, new, done, tensor.start, moved)
        data = changes[name].data
        new.seek(places[name])
        new.write(memoryview(data.numpy()))  # type: ignore[arg-type]
        done = tensor.start + tensor.size
        if len(data) != tensor.size:
            room, needed = _padded(tensor.size, layout.alignment), _padded(len(data), layout.alignment)
            new.write(bytes(needed - len(data)))
            done, moved = min(tensor.start + room, size), moved + needed - room
    end = new.tell() if done == size else size + moved
    copy_range(old, new, done, size, moved)
    end_at(old, new, size, end)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
