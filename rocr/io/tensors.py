"""Read and write rocr's own safetensors files: a JSON header and tensors, nothing that runs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocr.errors import InputError, RocrError
from rocr.io.disk_space import check_space
from rocr.io.json_values import parse_json
from rocr.io.output import new_file
from rocr.io.safetensors_layout import MAX_HEADER_BYTES

MAX_TENSORS = 10_000


def read_tensors(path: str | os.PathLike[str], expected_format: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON header and the tensors of one of rocr's safetensors files.

    Raises:
        InputError: the file is missing, damaged, or of another format.
    """
    header = read_header(path)
    if header["format"] != expected_format:
        raise InputError(f"{path} is a file of the kind {header['format']!r}, not {expected_format!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {str(error)[:200]}.") from None


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of one of rocr's files, without its tensors.

    Raises:
        InputError: the file is missing, damaged, or not one of rocr's.
    """
    try:
        if not Path(path).is_file():
            raise InputError(f"{path} is not there, or not a file.")
        _check_header_size(path)
        with safe_open(path, framework="pt") as file:
            if len(file.keys()) > MAX_TENSORS:
                raise ValueError(f"it holds {len(file.keys()):,} tensors, and the limit is {MAX_TENSORS:,}")
            header = parse_json((file.metadata() or {}).get("rocr", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a file of rocr: {str(error)[:200]}.") from None
    if not isinstance(header, dict) or not str(header.get("format", "")).startswith("rocr "):
        raise InputError(f"{path} is not a file of rocr: it has no such header.")
    return header


def write_tensors(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool = False
) -> None:
    """Write such a file, complete or not at all.

    Raises:
        InputError: it exists and `overwrite` is not set, or the disk is too small.
        RocrError: it cannot be written.
    """
    text = json.dumps(header)
    if len(text) > MAX_HEADER_BYTES // 2:
        raise RocrError(
            f"{path} cannot be written: its header has {len(text):,} bytes; use fewer concepts in one file."
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


def _check_header_size(path: str | os.PathLike[str]) -> None:
    """Refuse a header that would take much memory before anything is parsed."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"its header is said to have {size:,} bytes, and the limit is {MAX_HEADER_BYTES:,}")
