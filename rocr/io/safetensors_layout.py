"""The header of a safetensors file: which tensors it holds, and where; nothing else of the file is read."""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.io.dtypes import STORED_DTYPES, torch_dtype
from rocr.io.json_values import list_of, parse_json, text_of, whole_number_of

MAX_HEADER_BYTES = 32 * 2**20
"""Room for the names and numbers of a hundred thousand concepts; parsed, it takes some hundred MiB."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: its name in the file.
        file: the file's path.
        dtype: of its values.
        shape: of its values.
        start: offset of its first byte in the file.
        size: its bytes.
        kind: its dtype as the file calls it, such as "BF16".
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    kind: str = ""

    def read(self) -> Tensor:
        """Read the tensor, and nothing else of the file.

        Raises:
            InputError: the file ends before it.
        """
        values = torch.empty(self.shape, dtype=self.dtype)
        buffer: Any = values.reshape(-1).view(torch.uint8).numpy() if self.size else b""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.size:
                count = file.readinto(memoryview(buffer)[done:])
                if not count:
                    raise InputError(f"{self.file} ends within the tensor {self.name}.")
                done += count
        return values

    def map(self) -> Tensor:
        """The tensor in the file's own pages: read as they are used, and dropped again where memory is short.

        What is written to it stays in memory and never reaches the file. A tensor that lies across its own
        alignment is read instead.

        Raises:
            InputError: the file ends before it.
        """
        if not self.size or self.start % self.dtype.itemsize:
            return self.read()
        begin = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.start + self.size:
                raise InputError(f"{self.file} ends within the tensor {self.name}.")
            pages = mmap.mmap(file.fileno(), self.start + self.size - begin, access=mmap.ACCESS_COPY, offset=begin)
        count = self.size // self.dtype.itemsize
        return torch.frombuffer(pages, dtype=self.dtype, count=count, offset=self.start - begin).reshape(self.shape)


def read_layout(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header.

    Raises:
        InputError: the file is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"its header is said to have {length:,} bytes, the file has {size:,}")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        found = {name: _stored(name, entry, path, 8 + length) for name, entry in entries}
        _check_ranges(list(found.values()), 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a safetensors file: {str(error)[:200]}.") from None
    return found


def _stored(name: str, entry: dict[str, Any], path: Path, base: int) -> StoredTensor:
    kind = text_of(entry["dtype"], "dtype")
    shape = tuple(whole_number_of(length, "a length") for length in list_of(entry["shape"], "shape"))
    start, end = (whole_number_of(offset, "an offset") for offset in list_of(entry["data_offsets"], "data_offsets"))
    if kind not in STORED_DTYPES:
        # Another kind, such as F4, is copied as bytes and its values are never used.
        return StoredTensor(name, path, torch.uint8, (end - start,), base + start, end - start, kind)
    dtype = torch_dtype(STORED_DTYPES[kind])
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} is {kind} of shape {shape}, but has {end - start} bytes")
    return StoredTensor(name, path, dtype, shape, base + start, end - start, kind)


def _check_ranges(tensors: list[StoredTensor], start: int, size: int) -> None:
    """Refuse holes, overlaps and a file that is cut short or goes on."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != start:
            raise ValueError(f"{tensor.name} begins at byte {tensor.start:,}, not at {start:,}")
        start += tensor.size
    if start != size:
        raise ValueError(f"its tensors end at byte {start:,}, but the file has {size:,}")
