"""Read the header of a safetensors file: which tensors it holds, where they are, and its metadata."""

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
from rocr.io.dtypes import BYTE_KINDS, STORED_DTYPES, torch_dtype
from rocr.io.json_values import list_of, object_of, parse_json, text_of, whole_number_of

MAX_HEADER_BYTES = 32 * 2**20
"""Limit of a header: enough for a hundred thousand concepts. A parsed header takes some hundred MiB of memory."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        name: The tensor's name in the file.
        file: The path of the file.
        dtype: The dtype of the values; uint8 if `kind` is not one of `STORED_DTYPES`.
        shape: The shape of the values; (size,) if `kind` is in neither `STORED_DTYPES` nor `BYTE_KINDS`.
        start: The offset of the first byte in the file.
        size: The number of bytes.
        kind: The name of the dtype in the file, such as "BF16".
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    kind: str = ""

    def read(self) -> Tensor:
        """Read the tensor into memory.

        Raises:
            InputError: The file ends within the tensor.
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
        """Memory-map the tensor: pages are read when they are used, and dropped when memory is short.

        Writes to the tensor stay in memory and do not change the file. A tensor that is not aligned to its dtype is
        read instead. A map holds an open file until the tensor is deleted.

        Raises:
            InputError: The file ends within the tensor.
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


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file.

    Attributes:
        tensors: The tensors by their names.
        metadata: The texts that the writer of the file added.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_layout(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by their names, from its header.

    Raises:
        InputError: The file is damaged.
        OSError: The file cannot be opened or read.
    """
    return read_safetensors_header(path).tensors


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read the header of a safetensors file, and nothing else of the file.

    Raises:
        InputError: The file is damaged.
        OSError: The file cannot be opened or read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(
                    f"its header claims {length:,} bytes, but the file has {size:,} and the limit is "
                    f"{MAX_HEADER_BYTES:,}"
                )
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        texts = object_of(header.pop("__metadata__", {}), "__metadata__")
        metadata = {name: text_of(text, f"{name[:60]!r} in __metadata__") for name, text in texts.items()}
        tensors = {name: _stored(name, entry, path, 8 + length) for name, entry in header.items()}
        _check_ranges(list(tensors.values()), 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a safetensors file: {str(error)[:200]}.") from None
    return SafetensorsHeader(tensors, metadata)


def _stored(name: str, entry: dict[str, Any], path: Path, base: int) -> StoredTensor:
    kind = text_of(entry["dtype"], "dtype")
    shape = tuple(whole_number_of(length, "a length") for length in list_of(entry["shape"], "shape"))
    start, end = (whole_number_of(offset, "an offset") for offset in list_of(entry["data_offsets"], "data_offsets"))
    name_of_dtype = (STORED_DTYPES | BYTE_KINDS).get(kind)
    if name_of_dtype is None:
        # Another kind, such as F4, is copied as bytes and its values are never used.
        return StoredTensor(name, path, torch.uint8, (end - start,), base + start, end - start, kind)
    dtype = torch_dtype(name_of_dtype)
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} is {kind} of shape {shape}, but has {end - start:,} bytes")
    return StoredTensor(name, path, dtype, shape, base + start, end - start, kind)


def _check_ranges(tensors: list[StoredTensor], start: int, size: int) -> None:
    """Raise ValueError unless the tensors follow each other without holes or overlaps and fill the file."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != start:
            raise ValueError(f"{tensor.name} begins at byte {tensor.start:,}, not at {start:,}")
        start += tensor.size
    if start != size:
        raise ValueError(f"its tensors end at byte {start:,}, but the file has {size:,}")
