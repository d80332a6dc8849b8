"""Where the tensors of a GGUF file are, in which type, and which of them holds a weight of a loaded model.

The header is read with the package gguf, which also decodes and encodes blocks of quantised values and has the names of
tensors for every architecture. Its classes are used only inside `read_gguf_layout` and the functions on tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rocr.errors import InputError
from rocr.io.boundary import calling
from rocr.model.gguf import check_gguf_support, fast_reader

WRITTEN_KINDS = ("F32", "F16", "BF16", "Q8_0")
"""The types that edited tensors are written in. Others round an update too coarsely, or cannot be encoded here."""
PLAIN_KINDS = ("F32", "F16", "BF16")
"""Of these, the ones that hold one value at a time, so that the bytes follow from the values."""
COMPARED_ROUNDING = 1e-6
"""Largest difference of two libraries' values of one quantised tensor, as a share of its largest value: they add the
products of a block's scales in another order."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        file: The file.
        name: The name of the tensor.
        kind: The name of its type, such as "Q8_0".
        shape: Its shape with the last dimension contiguous: (d_out, d_in), or (experts, d_out, d_in).
        start: Offset of its first byte in the file.
        size: Number of its bytes.
        info: Offset in the file of its type in the header; the 8 bytes after the 4 of the type are its offset in the
            data section.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int
    info: int

    def read_bytes(self) -> Tensor:
        """Return the bytes of the tensor, (size,) uint8."""
        mapped = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.start, shape=(self.size,))
        return torch.from_numpy(np.array(mapped))

    def read(self) -> Tensor:
        """Return the values of the tensor in float32.

        Raises:
            InputError: The package gguf cannot decode the type.
        """
        return decode(self.read_bytes(), self.kind, self.shape, f"{self.name} in {self.file}")


@dataclass(frozen=True)
class GgufLayout:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        architecture: The value of general.architecture.
        blocks: Number of decoder layers, from the metadata; 0 if it does not say.
        tensors: The tensors by name, in ascending order of `start`.
        data_start: Offset of the data section.
        alignment: What offsets of tensors are multiples of.
    """

    path: Path
    architecture: str
    blocks: int
    tensors: dict[str, GgufTensor]
    data_start: int
    alignment: int

    def describe(self) -> dict[str, Any]:
        """Describe the tensors for a report: their number, and a digest of names, types and shapes."""
        said = sorted((tensor.name, tensor.kind, tensor.shape) for tensor in self.tensors.values())
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        return {"of": "names, types and shapes", "count": len(said), "sha256": digest}

    def find(self, parameter: str, depth: int) -> GgufTensor:
        """Return the tensor that holds a parameter of a model of transformers.

        Args:
            parameter: The name of the parameter in the model's state dict.
            depth: Number of decoder layers of the model.

        Raises:
            InputError: The package gguf does not know the architecture, or the file holds no such tensor.
        """
        for name in self.names_of(parameter, depth):
            if name in self.tensors:
                return self.tensors[name]
        raise InputError(
            f"{self.path} holds no tensor that the package gguf knows as {parameter}, so an edited copy cannot be "
            "written. Write the model as a folder instead (--save model)."
        )

    def names_of(self, parameter: str, depth: int) -> Iterator[str]:
        """Yield the names that the tensor of a parameter may have; see `find`."""
        import gguf

        kinds = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture]
        if not kinds:
            raise InputError(
                f"{self.path} has the architecture {self.architecture[:60]!r}, which the installed package gguf does "
                "not know: install a newer one."
            )
        names = gguf.get_tensor_name_map(kinds[0], max(self.blocks, depth))
        for candidate in _candidates(parameter):
            found = names.get_name(candidate, try_suffixes=(".weight",))
            if found:
                yield from (found, f"{found}.weight")


def _candidates(parameter: str) -> Iterator[str]:
    """Yield a name, and the names of the same parameter in parts of the model: some are stored without the head."""
    while parameter:
        yield parameter
        parameter = parameter.partition(".")[2]


def read_gguf_layout(path: Path) -> GgufLayout:
    """Read and check the header of a GGUF file.

    Raises:
        InputError: The package gguf is missing, or the file is damaged, in big-endian byte order, one part of a split
            model, or has tensors that overlap.
    """
    check_gguf_support()
    with calling(f"Reading {path}", "Check that the file is a complete GGUF file."), fast_reader():
        import gguf

        reader = gguf.GGUFReader(path)
        # The layout keeps no reference to the reader, which maps the file.
        return _layout(path, reader)


def _layout(path: Path, reader: Any) -> GgufLayout:
    if reader.byte_order != "I":
        raise InputError(
            f"{path} is in the byte order of another kind of machine; rocr edits little-endian files only."
        )
    parts = _number(reader, "split.count")
    if parts > 1:
        raise InputError(
            f"{path} is one of the {parts} files of a split model. Join them with llama.cpp's `llama-gguf-split "
            "--merge`, and give the result."
        )
    size = os.path.getsize(path)
    found = []
    for tensor in reader.tensors:
        name_bytes, dimensions = len(tensor.field.parts[1]), int(tensor.field.parts[2][0])
        info = int(tensor.field.offset) + 8 + name_bytes + 4 + 8 * dimensions
        shape = tuple(int(length) for length in reversed(tensor.shape.tolist()))
        start, length = int(tensor.data_offset), int(tensor.n_bytes)
        if start + length > size:
            raise InputError(f"{path} is cut off: it has {size:,} bytes, and {tensor.name} ends at {start + length:,}.")
        found.append(GgufTensor(path, tensor.name, tensor.tensor_type.name, shape, start, length, info))
    found.sort(key=lambda tensor: tensor.start)
    for tensor, after in itertools.pairwise(found):
        if tensor.start + tensor.size > after.start:
            raise InputError(f"{path} is damaged: the tensors {tensor.name} and {after.name} overlap.")
    architecture = str(_value(reader.fields["general.architecture"]))
    blocks = _number(reader, f"{architecture}.block_count")
    tensors = {tensor.name: tensor for tensor in found}
    return GgufLayout(path, architecture, blocks, tensors, int(reader.data_offset), int(reader.alignment))


def _number(reader: Any, key: str) -> int:
    """Return a number of the metadata; 0 if there is none."""
    field = reader.get_field(key)
    return 0 if field is None else int(_value(field))


def _value(field: Any) -> Any:
    """Return the text or number of a field of the metadata, and of a list a text with its length."""
    from gguf import GGUFValueType

    if GGUFValueType.ARRAY in field.types:
        return f"a list of {len(field.data):,}"
    part = field.parts[field.data[0]]
    return bytes(part).decode() if field.types[0] == GGUFValueType.STRING else part[0].item()


def decode(stored: Tensor, kind: str, shape: tuple[int, ...], what: str) -> Tensor:
    """Return the values of the bytes of a tensor in float32.

    Args:
        stored: (bytes,) uint8.
        kind: The name of the type.
        shape: The shape of the tensor.
        what: The tensor, for messages.

    Raises:
        InputError: The package gguf cannot decode the type.
    """
    import gguf

    with calling(f"Decoding {what}, stored as {kind}"):
        rows = stored.numpy().reshape(*shape[:-1], -1)
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))


def encode(values: Tensor, kind: str, what: str) -> Tensor:
    """Return values in the bytes of a type, each rounded once.

    Args:
        values: float32, with d_in as the last dimension.
        kind: One of `WRITTEN_KINDS`.
        what: The tensor, for messages.

    Returns:
        (bytes,) uint8.

    Raises:
        InputError: Rows of this length cannot be stored in the type.
    """
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[type_]
    if values.shape[-1] % block:
        raise InputError(
            f"{what} has rows of {values.shape[-1]} values and cannot be stored as {kind}, which has blocks of "
            f"{block}: choose another type with --gguf-type."
        )
    with np.errstate(over="ignore"):  # the caller refuses values that are not finite
        rows = gguf.quants.quantize(np.ascontiguousarray(values.numpy()), type_)
    return torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8).reshape(-1))


def encode_changed(values: Tensor, tensor: GgufTensor, kind: str) -> Tensor:
    """Return new values of a tensor in the bytes of a type. Rows that keep their values and type keep their bytes.

    Encoding what was decoded from blocks does not always give the first bytes, and experts without an update must keep
    theirs.

    Args:
        values: float32 in the shape of the tensor.
        tensor: The tensor.
        kind: The type to write, one of `WRITTEN_KINDS`.

    Returns:
        (bytes,) uint8.
    """
    if kind != tensor.kind:
        return encode(values, kind, tensor.name)
    rows = values.reshape(-1, values.shape[-1])
    stored = tensor.read_bytes().reshape(len(rows), -1)
    changed = (rows != tensor.read().reshape(rows.shape)).any(dim=1)
    if changed.any():
        stored[changed] = encode(rows[changed], kind, tensor.name).reshape(-1, stored.shape[1])
    return stored.reshape(-1)


def kind_to_write(tensor: GgufTensor, chosen: str | None) -> str:
    """Return the type to write an edited tensor in: the chosen one, else its own, or F16 if that cannot be written."""
    return chosen or (tensor.kind if tensor.kind in WRITTEN_KINDS else "F16")


def size_of(shape: tuple[int, ...], kind: str) -> int:
    """Return the number of bytes of a tensor in a type; raise InputError if the package gguf does not know the type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[_kind(kind)]
    return int(math.prod(shape) // block * size)


def number_of_kind(kind: str) -> int:
    """Return the number of a type in a header; raise InputError if the package gguf does not know the type."""
    return int(_kind(kind))


def _kind(name: str) -> Any:
    import gguf

    if name not in gguf.GGMLQuantizationType.__members__:
        raise InputError(f"{name[:60]!r} is not a type of tensors that the installed package gguf knows.")
    return gguf.GGMLQuantizationType[name]


def agrees(loaded: Tensor, tensor: GgufTensor, stored: Tensor) -> bool:
    """Return whether loaded values are those of a stored tensor up to the rounding of two libraries.

    Args:
        loaded: The loaded values in the shape of the tensor.
        tensor: The tensor.
        stored: Its values in float32.
    """
    if loaded.shape != stored.shape:
        return False
    mine = loaded.detach().float().cpu()
    if loaded.dtype == torch.float32 and tensor.kind in WRITTEN_KINDS:
        return torch.equal(mine, stored)
    relative = 0.0 if loaded.dtype == torch.float32 else 2 * torch.finfo(loaded.dtype).eps
    return torch.allclose(mine, stored, rtol=relative, atol=COMPARED_ROUNDING * float(stored.abs().max()))


def summary(path: Path) -> dict[str, Any]:
    """Return what a GGUF file holds: the texts and numbers of its metadata by key, and its tensors by type.

    Raises:
        InputError: The file is missing or damaged; see `read_gguf_layout`.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    layout = read_gguf_layout(path)
    with calling(f"Reading {path}"), fast_reader():
        import gguf

        found = {name: _value(field) for name, field in gguf.GGUFReader(path).fields.items()}
    kinds: dict[str, int] = {}
    for tensor in layout.tensors.values():
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + 1
    return found | {"tensors": kinds}
