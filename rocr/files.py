"""Read and write rocr's own safetensors files: a JSON header and tensors, nothing that runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocr.errors import InputError, RocrError
from rocr.output import new_file


def read_tensors(path: str | os.PathLike[str], expected_format: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON header and the tensors of one of rocr's safetensors files.

    Raises:
        InputError: the file is missing, damaged, or of another format.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is not there, or not a file.")
    kind = expected_format.rsplit(" ", 1)[0]
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("rocr", "{}"))
            if not isinstance(header, dict) or header.get("format") != expected_format:
                found = header.get("format") if isinstance(header, dict) else None
                raise InputError(f"{path} is not a file of the kind {expected_format!r}; it says {found!r}.")
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a {kind} file: {error}.") from None


def write_tensors(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool = False
) -> None:
    """Write such a file, complete or not at all.

    Raises:
        InputError: it exists and `overwrite` is not set.
        RocrError: it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with new_file(path, overwrite=overwrite) as partial:
        try:
            save_file(plain, partial, metadata={"rocr": json.dumps(header)})
        except SafetensorError as error:
            raise RocrError(f"{path} cannot be written: {error}.") from error
