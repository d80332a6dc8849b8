"""Checkpoints of the collection of statistics."""

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
from rocr.statistics.sums import LayerSums

FORMAT = "rocr checkpoint 1"


@dataclass
class Checkpoint:
    """The sums of the batches so far.

    The batches are the same in every run, so a resumed run gives the same bytes as one without an interruption. Each
    of several processes has its own checkpoint, which counts only the batches and tokens of that process.

    Attributes:
        path: The file. None never saves the state.
        identity: Description of the collection. A checkpoint with another one is refused.
        sums: For each layer the running sums, shared with the collection.
        batches: Number of batches that are in all sums.
        tokens: Number of tokens of these batches.
        added: For each layer the number of batches in its sum: `batches`, or one more while a batch is added.
        torn: Whether a sum contains a part of a batch and cannot be used.
    """

    path: Path | None
    identity: dict[str, Any]
    sums: Mapping[int, LayerSums]
    batches: int = 0
    tokens: int = 0
    added: dict[int, int] = field(default_factory=dict)
    torn: bool = False

    @classmethod
    def open(
        cls, path: str | os.PathLike[str] | None, identity: dict[str, Any], sums: Mapping[int, LayerSums]
    ) -> Checkpoint:
        """Start a collection, or resume it from the checkpoint at `path` if there is one.

        Raises:
            InputError: The file is damaged, or is the checkpoint of another collection.
        """
        state = cls(None if path is None else Path(path), identity, sums, added=dict.fromkeys(sums, 0))
        if state.path is not None and state.path.exists():
            state._load()
        return state

    def unfinished(self) -> list[int]:
        """Return the layers whose sums do not contain the batch after `batches`."""
        return [layer for layer, added in self.added.items() if added == self.batches]

    @contextmanager
    def adding(self, layer: int) -> Iterator[LayerSums]:
        """Yield the sum of a layer, to which the context adds a whole batch; signals are postponed until its end."""
        with postponed_signals():
            self.torn = True
            yield self.sums[layer]
            self.added[layer] += 1
            self.torn = False

    def finish_batch(self, tokens: int) -> None:
        """Count a batch that is in all sums."""
        with postponed_signals():
            self.batches += 1
            self.tokens += tokens
            self.added = dict.fromkeys(self.sums, self.batches)

    def save(self) -> None:
        """Write the state atomically. If a sum is torn, an earlier file stays as it is."""
        if self.path is None or self.torn or not any(self.added.values()):
            return
        header = {
            "format": FORMAT,
            "identity": self.identity,
            "batches": self.batches,
            "tokens": self.tokens,
            "added": {str(layer): added for layer, added in self.added.items()},
        }
        tensors = {
            name: total.cpu().contiguous()
            for layer, sums in self.sums.items()
            for name, total in _named(layer, sums).items()
        }
        write_tensors(self.path, header, tensors, overwrite=True)

    def close(self) -> None:
        """Save the state for the last time, before the sums are changed in place."""
        self.save()
        self.torn = True

    def _load(self) -> None:
        assert self.path is not None
        header, tensors = read_tensors(self.path, FORMAT)
        if header.get("identity") != json.loads(json.dumps(self.identity)):
            raise InputError(
                f"{self.path} is the checkpoint of another collection: the model, the text, the layers, the lengths, "
                "the dtype, the device, a setting or a version differs. Delete the file to start again."
            )
        try:
            self.batches, self.tokens = int(header["batches"]), int(header["tokens"])
            for layer, sums in self.sums.items():
                self.added[layer] = int(header["added"][str(layer)])
                for name, total in _named(layer, sums).items():
                    total.copy_(tensors[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path} is not a complete checkpoint: {error!r}. Delete it.") from None


def _named(layer: int, sums: LayerSums) -> dict[str, Tensor]:
    """Return the tensors of a layer's sums by their names in the file."""
    return {str(layer) if i == 0 else f"{layer}.{i}": total for i, total in enumerate(sums.tensors)}
