"""The weight files of a model's folder: which tensor lies in which safetensors file, and where.

Only headers are read here, and of every file no more than that; names, shapes and offsets are checked before
anything is trusted.
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
    values = dict.fromkeys(SUPPORTED_KINDS, 0)
    for tensor in stored:
        if tensor.kind in values and len(tensor.shape) > 1:
            values[tensor.kind] += math.prod(tensor.shape)
    kind = max(values, key=lambda kind: values[kind])
    return torch_dtype(SUPPORTED_KINDS[kind]) if values[kind] else None
