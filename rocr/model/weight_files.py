"""The safetensors files of a model's folder: which file holds which tensor, and where.

Only the headers of the files are read. Names, shapes and offsets are checked before they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rocr.errors import InputError
from rocr.io.dtypes import SUPPORTED_KINDS, torch_dtype
from rocr.io.json_values import parse_json
from rocr.io.safetensors_layout import StoredTensor, read_layout
from rocr.model.check_folder import INDEX_FILE, SINGLE_FILE, check_model_folder


@dataclass
class WeightFiles:
    """The safetensors files of a folder.

    Attributes:
        folder: The folder.
        file_of: The file name of each tensor. With an index, these are the names in the index until `read_headers`.
        index: The name of the index; None if the model is one file.
    """

    folder: Path
    file_of: dict[str, str]
    index: str | None = None
    _headers: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The names of the files, in ascending order."""
        return sorted(set(self.file_of.values()))

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    @property
    def is_complete(self) -> bool:
        """Whether all headers were read, so that the dtype and shape of every tensor are known."""
        return set(self._headers) >= set(self.file_of.values())

    def find(self, name: str) -> StoredTensor:
        """Return where a tensor is stored; read the header of its file if that was not done before.

        Raises:
            InputError: No file holds the tensor, or the file is damaged.
        """
        if name not in self.file_of:
            raise InputError(f"{self.folder} holds no tensor {name}.")
        file = self.file_of[name]
        if name not in self._header(file):
            raise self._missing(file, name)
        return self._header(file)[name]

    def read_headers(self) -> dict[str, StoredTensor]:
        """Return every tensor of every file by its name, with those that the index omits and loaders read too.

        Raises:
            InputError: A file is damaged, two files hold a tensor of the same name, or a file lacks a tensor that the
                index puts there.
        """
        found: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, stored in self._header(file).items():
                if name in found:
                    raise InputError(
                        f"{stored.file} and {found[name].file.name} both hold the tensor {name[:100]!r}; keep one of "
                        "them."
                    )
                found[name] = stored
        for name, file in self.file_of.items():
            if name not in found:
                raise self._missing(file, name)
        self.file_of = {name: stored.file.name for name, stored in found.items()}
        return found

    def _missing(self, file: str, name: str) -> InputError:
        return InputError(f"{self.folder / file} does not hold {name[:100]!r}, which {self.index} puts there.")

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            self._headers[file] = read_layout(self.folder / file)
        return self._headers[file]


def find_weight_files(folder: Path | None) -> WeightFiles | None:
    """Find the safetensors files that transformers loads from a folder.

    These are `model.safetensors` if it exists, whatever an index names, and else the files of the index. The files of
    an index are not opened here; `WeightFiles.find` reads the header of the one that it needs.

    Returns:
        The files; None if the folder holds no such files, or is None.

    Raises:
        InputError: The folder is not a complete and harmless model; see `check_model_folder`.
    """
    if folder is None:
        return None
    if not (folder / INDEX_FILE).exists() and not (folder / SINGLE_FILE).exists():
        return None
    check_model_folder(folder, whole=False)
    if (folder / SINGLE_FILE).is_file():
        layout = read_layout(folder / SINGLE_FILE)
        return WeightFiles(folder, dict.fromkeys(layout, SINGLE_FILE), _headers={SINGLE_FILE: layout})
    return WeightFiles(folder, parse_json((folder / INDEX_FILE).read_bytes())["weight_map"], INDEX_FILE)


def stored_dtype(files: WeightFiles, names: Iterable[str] | None = None) -> torch.dtype | None:
    """Return the dtype to load weights in: of float32, bfloat16 and float16, the one of most values in matrices.

    config.json may name another one, for example if a model was trained in float32 and its settings say bfloat16.

    Args:
        files: The model's files.
        names: The names of the tensors to count; None for all.

    Returns:
        The dtype; None if the model is quantised by its config.json, or no matrix has one of the three dtypes.
    """
    if parse_json((files.folder / "config.json").read_bytes()).get("quantization_config"):
        return None
    stored = files.read_headers().values() if names is None else [files.find(name) for name in names]
    values = dict.fromkeys(SUPPORTED_KINDS, 0)
    for tensor in stored:
        if tensor.kind in values and len(tensor.shape) > 1:
            values[tensor.kind] += math.prod(tensor.shape)
    kind = max(values, key=lambda kind: values[kind])
    return torch_dtype(SUPPORTED_KINDS[kind]) if values[kind] else None
