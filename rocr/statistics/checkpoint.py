"""The state of an interrupted collection of statistics, on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rocr.errors import InputError
from rocr.io.signals import postponed_signals
from rocr.io.tensors import read_tensors, write_tensors

FORMAT = "rocr checkpoint 1"


@dataclass
class Checkpoint:
    """Sums of the batches so far. Batches are the same in every run, so a resumed run ends in the same bytes.

    Of several processes that share the batches, each has a checkpoint, which counts its own batches and tokens.

    Attributes:
        path: the file; None: nothing is ever saved.
        identity: what the collection is; a checkpoint of another one is refused.
        sums: for each layer the running sum, (d_in, d_in) float32; shared with the collection.
        batches: number of batches that are in every sum.
        tokens: number of tokens in these batches.
        added: for each layer the batches in its sum: one more than `batches` where a batch is half done.
        torn: whether a sum holds a part of a batch, so that it cannot be used.
    """

    path: Path | None
    identity: dict[str, Any]
    sums: Mapping[int, Tensor]
    batches: int = 0
    tokens: int = 0
    added: dict[int, int] = field(default_factory=dict)
    torn: bool = False

    @classmethod
    def open(
        cls, path: str | os.PathLike[str] | None, identity: dict[str, Any], sums: Mapping[int, Tensor]
    ) -> Checkpoint:
        """Start a collection, or go on with the one whose checkpoint lies at `path`.

        Raises:
            InputError: the file is damaged or of another collection.
        """
        state = cls(None if path is None else Path(path), identity, sums, added=dict.fromkeys(sums, 0))
        if state.path is not None and state.path.exists():
            state._load()
        return state

    def unfinished(self) -> list[int]:
        """Layers whose sums lack the batch that comes after `batches`."""
        return [layer for layer, added in self.added.items() if added == self.batches]

    @contextmanager
    def adding(self, layer: int) -> Iterator[Tensor]:
        """A layer's sum, to which all of a batch is added inside; signals wait until that is done."""
        with postponed_signals():
            self.torn = True
            yield self.sums[layer]
            self.added[layer] += 1
            self.torn = False

    def finish_batch(self, tokens: int) -> None:
        """Count a batch that is in every sum."""
        with postponed_signals():
            self.batches += 1
            self.tokens += tokens
            self.added = dict.fromkeys(self.sums, self.batches)

    def save(self) -> None:
        """Write the state, complete or not at all; an earlier file stays where a sum is torn."""
        if self.path is None or self.torn or not any(self.added.values()):
            return
        header = {
            "format": FORMAT,
            "identity": self.identity,
            "batches": self.batches,
            "tokens": self.tokens,
            "added": {str(layer): added for layer, added in self.added.items()},
        }
        tensors = {str(layer): total.cpu().contiguous() for layer, total in self.sums.items()}
        write_tensors(self.path, header, tensors, overwrite=True)

    def close(self) -> None:
        """Save the state for the last time: the sums are about to become something else."""
        self.save()
        self.torn = True

    def _load(self) -> None:
        assert self.path is not None
        header, tensors = read_tensors(self.path, FORMAT)
        if header.get("identity") != json.loads(json.dumps(self.identity)):
            raise InputError(
                f"{self.path} is the checkpoint of another collection: the model, the text, the layers, the cutting, "
                "the dtype, the device, a setting or a version differ. Delete it to start afresh."
            )
        try:
            self.batches, self.tokens = int(header["batches"]), int(header["tokens"])
            for layer, total in self.sums.items():
                self.added[layer] = int(header["added"][str(layer)])
                total.copy_(tensors[str(layer)])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path} is not a complete checkpoint: {error!r}. Delete it.") from None
