"""The record of how a GGUF file stores an edited weight, from which the file's first bytes can be restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        data: Those bytes, (bytes,) uint8; of a tensor of several experts that keeps its type, those of the changed
            experts, in their order. None if the type holds one value at a time, so that the bytes follow from the
            values, or if they were not kept.
    """

    tensor: str
    before: str
    after: str
    sha256: str
    data: Tensor | None

    def to_json(self) -> dict[str, str]:
        """Return the fields as JSON values, without the bytes."""
        return {name: getattr(self, name) for name in FIELDS}

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


def stored_to_json(records: Sequence[StoredWeight], is_mixture: bool) -> tuple[Any, dict[str, Tensor]]:
    """Return the records of an update as JSON values, and the bytes that they keep by the names of tensors.

    Args:
        records: One record; for a mixture, one for each tensor.
        is_mixture: Whether the update is of a mixture.
    """
    kept = {
        f"stored.{i}" if is_mixture else "stored": record.data
        for i, record in enumerate(records)
        if record.data is not None
    }
    entries = [record.to_json() for record in records]
    return entries if is_mixture else entries[0], kept


def stored_from_json(values: Any, kept: Mapping[str, Tensor], is_mixture: bool) -> tuple[StoredWeight, ...]:
    """Return the inverse of `stored_to_json`.

    Args:
        values: The JSON values.
        kept: The bytes that were kept, by the names of tensors.
        is_mixture: Whether the update is of a mixture.

    Raises:
        TypeError, ValueError: A field is missing, unknown or has another type.
    """
    if isinstance(values, list) != is_mixture:
        raise ValueError(f"the record of stored weights is a {type(values).__name__}")
    if is_mixture:
        return tuple(StoredWeight.from_json(each, kept.get(f"stored.{i}")) for i, each in enumerate(values))
    return (StoredWeight.from_json(values, kept.get("stored")),)
