"""The weight files of a model's folder: which tensor lies in which safetensors file, and where.

Only headers are read here, and of every file no more than that; names, shapes and offsets are checked before
anything is trusted.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.io.json_values import list_of, parse_json, text_of, whole_number_of
from rocr.io.tensors import MAX_HEADER_BYTES
from rocr.model.check_folder import INDEX_FILE, SINGLE_FILE, check_model_folder

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
}
EDITED_KINDS = ("F32", "BF16", "F16")
"""What a weight must be stored as to be edited."""


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


@dataclass
class WeightFiles:
    """The safetensors files of a folder.

    Attributes:
        folder: where they lie.
        file_of: for each tensor the name of its file; of an index, what the index says until `read_headers`.
        index: name of the index that names the files; None where it is one file.
    """

    folder: Path
    file_of: dict[str, str]
    index: str | None = None
    _headers: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """Names of the files, ascending."""
        return sorted(set(self.file_of.values()))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    @property
    def is_complete(self) -> bool:
        """Whether all headers were read, so that every tensor is known with its dtype and shape."""
        return set(self._headers) >= set(self.file_of.values())

    def find(self, name: str) -> StoredTensor:
        """Where a tensor lies; reads its file's header once.

        Raises:
            InputError: no file holds it, or the file is damaged.
        """
        if name not in self.file_of:
            raise InputError(f"{self.folder} holds no tensor {name}.")
        file = self.file_of[name]
        if name not in self._header(file):
            raise InputError(f"{self.folder / file} does not hold {name}, though the index says so.")
        return self._header(file)[name]

    def read_headers(self) -> dict[str, StoredTensor]:
        """Every tensor of every file by its name, also those that the index leaves out, which loaders read too.

        Raises:
            InputError: a file is damaged, or two files hold a tensor of one name.
        """
        found: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, stored in self._header(file).items():
                if name in found:
                    raise InputError(f"{stored.file} holds {name[:100]!r}, which {found[name].file.name} holds too.")
                found[name] = stored
        for name, file in self.file_of.items():
            if name not in found:
                raise InputError(f"{self.folder / file} does not hold {name}, though the index says so.")
        self.file_of = {name: stored.file.name for name, stored in found.items()}
        return found

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            self._headers[file] = read_layout(self.folder / file)
        return self._headers[file]


def find_weight_files(folder: Path) -> WeightFiles | None:
    """The safetensors files that transformers loads from a folder; None where it has no such weights.

    It takes `model.safetensors` where that is there, whatever an index names, and else the files of the index. Of
    many files none is opened here: `WeightFiles.find` looks at the header of the one that it needs.

    Raises:
        InputError: the folder is not a complete and harmless model: see `check_model_folder`.
    """
    if not (folder / INDEX_FILE).exists() and not (folder / SINGLE_FILE).exists():
        return None
    check_model_folder(folder, whole=False)
    if (folder / SINGLE_FILE).is_file():
        layout = read_layout(folder / SINGLE_FILE)
        return WeightFiles(folder, dict.fromkeys(layout, SINGLE_FILE), _headers={SINGLE_FILE: layout})
    return WeightFiles(folder, parse_json((folder / INDEX_FILE).read_bytes())["weight_map"], INDEX_FILE)


def stored_dtype(files: WeightFiles, names: Iterable[str] | None = None) -> torch.dtype | None:
    """The dtype to load weights in: that of most values in matrices of float32, bfloat16 or float16.

    config.json may name another one, as where a model was trained in float32 and its settings say bfloat16.

    Args:
        files: the model's files.
        names: the tensors that count; None: all.

    Returns:
        None where config.json says that the model is quantised, or no matrix is of these dtypes.
    """
    if parse_json((files.folder / "config.json").read_bytes()).get("quantization_config"):
        return None
    stored = files.read_headers().values() if names is None else [files.find(name) for name in names]
    values = dict.fromkeys(EDITED_KINDS, 0)
    for tensor in stored:
        if tensor.kind in values and len(tensor.shape) > 1:
            values[tensor.kind] += math.prod(tensor.shape)
    kind = max(values, key=lambda kind: values[kind])
    return DTYPES[kind] if values[kind] else None


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
    if kind not in DTYPES:
        # Of another kind, such as F4: never read by rocr, but its bytes are carried along.
        return StoredTensor(name, path, torch.uint8, (end - start,), base + start, end - start, kind)
    if end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{name} is {kind} of shape {shape}, but has {end - start} bytes")
    return StoredTensor(name, path, DTYPES[kind], shape, base + start, end - start, kind)


def _check_ranges(tensors: list[StoredTensor], start: int, size: int) -> None:
    """Refuse holes, overlaps and a file that is cut short or goes on."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != start:
            raise ValueError(f"{tensor.name} begins at byte {tensor.start:,}, not at {start:,}")
        start += tensor.size
    if start != size:
        raise ValueError(f"its tensors end at byte {start:,}, but the file has {size:,}")
