"""The state of an interrupted collection of statistics, on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rocr.errors import InputError
from rocr.files import read_tensors, write_tensors

FORMAT = "rocr checkpoint 1"


@dataclass
class Checkpoint:
    """Sums of the batches so far. Batches are the same in every run, so a resumed run ends in the same bytes.

    Attributes:
        path: the file; None: nothing is ever saved.
        identity: what the collection is; a checkpoint of another one is refused.
        sums: for each layer the running sum, (d_in, d_in) float32; shared with the collection.
        batches: number of batches in the sums.
        tokens: number of tokens in the sums.
    """

    path: Path | None
    identity: dict[str, Any]
    sums: Mapping[int, Tensor]
    batches: int = 0
    tokens: int = 0

    @classmethod
    def open(
        cls, path: str | os.PathLike[str] | None, identity: dict[str, Any], sums: Mapping[int, Tensor]
    ) -> Checkpoint:
        """Start a collection, or go on with the one whose checkpoint lies at `path`.

        Raises:
            InputError: the file is damaged or of another collection.
        """
        state = cls(None if path is None else Path(path), identity, sums)
        if state.path is not None and state.path.exists():
            state._load()
        return state

    def save(self) -> None:
        """Write the state, complete or not at all."""
        if self.path is None or self.batches == 0:
            return
        header = {"format": FORMAT, "identity": self.identity, "batches": self.batches, "tokens": self.tokens}
        tensors = {str(layer): total.cpu().contiguous() for layer, total in self.sums.items()}
        write_tensors(self.path, header, tensors, overwrite=True)

    def remove(self) -> None:
        """Delete the file: the collection is complete and saved elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _load(self) -> None:
        assert self.path is not None
        header, tensors = read_tensors(self.path, FORMAT)
        if header.get("identity") != json.loads(json.dumps(self.identity)):
            raise InputError(
                f"{self.path} is the checkpoint of another collection: the model, the text, the layers or the cutting "
                "differ. Delete it to start afresh."
            )
        try:
            self.batches, self.tokens = int(header["batches"]), int(header["tokens"])
            for layer, total in self.sums.items():
                total.copy_(tensors[str(layer)])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path} is not a complete checkpoint: {error!r}. Delete it.") from None
