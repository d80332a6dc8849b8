"""Replace tensors of safetensors files by others of other names, dtypes and shapes; all others keep their bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from rocr.export.copying import BLOCK
from rocr.io.dtypes import STORED_DTYPES, dtype_name
from rocr.io.safetensors_layout import StoredTensor, read_safetensors_header

KIND_OF_DTYPE = {name: kind for kind, name in STORED_DTYPES.items()}
_Entry: TypeAlias = "StoredTensor | Tensor | Deferred"
ALIGNMENT = 8
"""Headers are padded with spaces to a multiple of this many bytes, as safetensors does."""


@dataclass(frozen=True)
class Deferred:
    """A tensor whose values are computed when they are written, so that only one is in memory.

    Attributes:
        shape: The shape.
        dtype: The dtype.
        compute: Returns the values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Replacements:
    """Tensors that take the place of others in the files of a model.

    Attributes:
        removed: For each file the names of the tensors that it loses.
        added: For each file the tensors that it gains, by their names.
        headers: For each file the text of the header to write instead of a new one, for the resulting tensors.
        config: The bytes of config.json; None keeps the model's own.
        index: The bytes of the index of the weight files; None writes a new one.
    """

    removed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    added: Mapping[str, Mapping[str, Tensor | Deferred]] = field(default_factory=dict)
    headers: Mapping[str, bytes] = field(default_factory=dict)
    config: bytes | None = None
    index: bytes | None = None

    @property
    def files(self) -> set[str]:
        """The files that change their layout."""
        return {*self.removed, *self.added}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors that are added."""
        return sum(tensor.nbytes for tensors in self.added.values() for tensor in tensors.values())

    def weight_map(self, file_of: Mapping[str, str]) -> dict[str, str]:
        """Return the file of each tensor after the replacement, from the file of each one before."""
        gone = {name for names in self.removed.values() for name in names}
        kept = {name: file for name, file in file_of.items() if name not in gone}
        return kept | {name: file for file, tensors in self.added.items() for name in tensors}

    def write(self, source: Path, changed: Sequence[tuple[StoredTensor, Tensor]], target: Path) -> None:
        """Write a copy of a file with its tensors replaced.

        Tensors of elements of one size keep their order, and added ones follow them.

        Args:
            source: The file.
            changed: Tensors that keep their name, dtype and shape and get other values.
            target: The file to write.

        Raises:
            OSError: A read or write fails.
        """
        stored = read_safetensors_header(source).tensors
        gone = set(self.removed.get(source.name, ()))
        entries: dict[str, _Entry] = {name: place for name, place in stored.items() if name not in gone}
        entries |= {place.name: tensor for place, tensor in changed}
        entries |= self.added.get(source.name, {})
        text = self.headers.get(source.name)
        if text is None:
            text = _new_header(entries, json.loads(header_text(source)))
        order = json.loads(text)
        order.pop("__metadata__", None)
        names = sorted(order, key=lambda name: tuple(order[name]["data_offsets"]))
        _write(source, text, [entries[name] for name in names], target)


def header_text(path: Path) -> bytes:
    """Return the JSON text of a safetensors header, with its padding."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _write(source: Path, text: bytes, entries: Sequence[_Entry], target: Path) -> None:
    """Write a header and the bytes of the tensors that it describes, in the order of their offsets."""
    with source.open("rb", buffering=0) as old, target.open("xb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        end = 8 + len(text)
        for entry in entries:
            if isinstance(entry, StoredTensor):
                _copy(old, new, entry, end)
                end += entry.size
            else:
                values = entry.compute() if isinstance(entry, Deferred) else entry
                buffer: Any = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                new.seek(end)
                new.write(memoryview(buffer))
                end += entry.nbytes
        new.flush()
        new.truncate(end)


def _copy(old: BinaryIO, new: BinaryIO, place: StoredTensor, start: int) -> None:
    """Copy the bytes of a stored tensor to an offset of another file."""
    old.seek(place.start)
    new.seek(start)
    left = place.size
    while left:
        block = old.read(min(left, BLOCK))
        if not block:
            raise OSError("the file shrank while it was read")
        new.write(block)
        left -= len(block)


def _new_header(entries: Mapping[str, _Entry], before: Mapping[str, Any]) -> bytes:
    """Return a header for tensors, those of larger elements first, so that each one is aligned to its elements.

    Args:
        entries: The tensors.
        before: The header of the file that stored tensors are copied from.
    """
    fields: dict[str, Any] = {name: before[name] for name in before if name == "__metadata__"}
    end = 0
    for name in sorted(entries, key=lambda name: -_itemsize(entries[name], before.get(name))):
        entry = entries[name]
        if isinstance(entry, StoredTensor):
            kind, shape, size = entry.kind, before[name]["shape"], entry.size
        else:
            kind, shape, size = KIND_OF_DTYPE[dtype_name(entry.dtype)], list(entry.shape), entry.nbytes
        fields[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNMENT)


def _itemsize(entry: _Entry, before: Any) -> int:
    """Return the bytes of an element of a tensor, or 1 for a kind of less than a byte."""
    if isinstance(entry, StoredTensor):
        size: int = entry.size // max(1, math.prod(before["shape"]))
        return max(1, size)
    return entry.dtype.itemsize
