"""The record of how a GGUF file stores an edited weight, from which the file's first bytes can be restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rocr.io.json_values import text_of

FIELDS = ("tensor", "before", "after", "sha256")


@dataclass(frozen=True)
class StoredWeight:
    """How a GGUF file stores a weight before and after an update.

    Attributes:
        tensor: Name of the tensor in the file.
        before: Name of its type before the update, such as "Q8_0".
        after: Name of its type after the update.
        sha256: sha256 of the tensor's bytes before the update.
        data: Those bytes, (bytes,) uint8. None if the type holds one value at a time, so that the bytes follow from the
            values, or if they were not kept.
    """

    tensor: str
    before: str
    after: str
    sha256: str
    data: Tensor | None

    def to_json(self, undo: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Return the fields as JSON values, and the bytes as a tensor by its name.

        Args:
            undo: Whether to include the bytes.
        """
        kept = {"stored": self.data} if undo and self.data is not None else {}
        return {name: getattr(self, name) for name in FIELDS}, kept

    @classmethod
    def from_json(cls, values: dict[str, Any], data: Tensor | None) -> StoredWeight:
        """Return the inverse of `to_json`.

        Raises:
            TypeError, ValueError: A field is missing, unknown or has another type.
        """
        if set(values) != set(FIELDS):
            raise ValueError(f"the record of a stored weight has the fields {', '.join(map(str, values))[:60]}")
        if data is not None and (data.dtype != torch.uint8 or data.ndim != 1):
            raise ValueError(f"the stored bytes of a weight are {data.dtype} of shape {tuple(data.shape)}")
        tensor, before, after, sha256 = (text_of(values[name], name) for name in FIELDS)
        return cls(tensor, before, after, sha256, data)
