"""Read and write the safetensors files of rocr: tensors with a JSON header, and no code."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rocr.argument_checks import check_path
from rocr.errors import InputError, RocrError
from rocr.io.disk_space import check_space
from rocr.io.dtypes import STORED_DTYPES
from rocr.io.json_values import parse_json
from rocr.io.output import new_file
from rocr.io.safetensors_layout import MAX_HEADER_BYTES, StoredTensor, read_safetensors_header

MAX_TENSORS = 10_000
MAPPED_BYTES = 2**20
"""Tensors of at least this many bytes are memory-mapped; a map of each smaller one would need too many open files."""


def read_tensors(path: str | os.PathLike[str], expected_format: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON header and the tensors of a safetensors file of rocr.

    Args:
        path: The path of the file.
        expected_format: The format that the header must name, such as "rocr edit 1".

    Returns:
        The header, and the tensors by their names, on the CPU.

    Raises:
        InputError: The file is missing, damaged, or of another format.
    """
    header, stored = _read(path)
    if header["format"] != expected_format:
        raise InputError(f"{path} has the format {header['format']!r}, but {expected_format!r} is needed.")
    try:
        return header, {name: _load(tensor) for name, tensor in stored.items()}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {str(error)[:200]}.") from None


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON header of a safetensors file of rocr, without the tensors.

    Raises:
        InputError: The file is missing, damaged, or not a file of rocr.
    """
    return _read(path)[0]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Read the JSON header of a file of rocr, and where its tensors are."""
    check_path("path", path)
    try:
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist or is not a file.")
        found = read_safetensors_header(Path(path))
        if len(found.tensors) > MAX_TENSORS:
            raise ValueError(f"it holds {len(found.tensors):,} tensors, and the limit is {MAX_TENSORS:,}")
        header = parse_json(found.metadata.get("rocr", "{}"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a file of rocr: {str(error)[:200]}.") from None
    if not isinstance(header, dict) or not str(header.get("format", "")).startswith("rocr "):
        raise InputError(f"{path} is not a file of rocr: its metadata has no header of rocr.")
    return header, found.tensors


def _load(stored: StoredTensor) -> Tensor:
    if stored.kind not in STORED_DTYPES:
        raise ValueError(
            f"the tensor {stored.name[:60]!r} has the dtype {stored.kind[:20]!r}, which rocr does not read"
        )
    return stored.map() if stored.size >= MAPPED_BYTES else stored.read()


def write_tensors(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool = False
) -> None:
    """Write a safetensors file of rocr, completely or not at all.

    Args:
        path: The path of the file.
        header: The JSON header; its field "format" names the format.
        tensors: The tensors by their names.
        overwrite: Whether an existing file is replaced.

    Raises:
        InputError: The file exists and `overwrite` is off, or the disk has too little free space.
        RocrError: The file cannot be written.
    """
    check_path("path", path)
    text = json.dumps(header)
    if len(text) > MAX_HEADER_BYTES // 2:
        raise RocrError(
            f"{path} cannot be written: its header has {len(text):,} bytes, and the limit is "
            f"{MAX_HEADER_BYTES // 2:,}; use fewer concepts in one file."
        )
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    places = Counter(tensor.data_ptr() for tensor in plain.values())  # safetensors refuses two names of one memory
    plain = {name: tensor.clone() if places[tensor.data_ptr()] > 1 else tensor for name, tensor in plain.items()}
    with new_file(path, overwrite=overwrite) as partial:
        check_space(partial, len(text) + sum(tensor.nbytes for tensor in plain.values()))
        try:
            save_file(plain, partial, metadata={"rocr": text})
        except SafetensorError as error:
            raise RocrError(f"{path} cannot be written: {error}.") from error
