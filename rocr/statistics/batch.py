"""Collect the keys of one batch of text at one layer, and add them to its sums in one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rocr.errors import InputError, RocrError
from rocr.model.blocks import LayerBlocks
from rocr.model.capture import as_sequence, input_hook
from rocr.model.gated_keys import GatedKeys, gated_keys_hook
from rocr.statistics.checkpoint import Checkpoint

FIRST_TOKENS = 1
"""Number of tokens at the beginning of a sequence whose keys are left out."""


@dataclass
class LayerCollector:
    """Receives the keys of a batch, which runs in one or more pieces, at one layer.

    Attributes:
        state: The sums.
        layer: The blocks of the layer.
        count: Number of keys to add, from the beginning of the batch; first tokens do not count.
        is_done: Whether the batch is in the sums.
    """

    state: Checkpoint
    layer: LayerBlocks
    count: int
    is_done: bool = False
    _shape: torch.Size = field(default_factory=torch.Size)
    _piece: int = 0
    _is_last: bool = False
    _received: int = 0
    _before: int = 0
    _keys: list[Tensor] = field(default_factory=list)
    _routed: list[tuple[int, GatedKeys]] = field(default_factory=list)

    def begin(self, number: int, shape: torch.Size, is_last: bool) -> None:
        """Expect the keys of the next piece, whose tokens have a shape (sequences, tokens)."""
        self._piece, self._shape, self._is_last = number, shape, is_last

    @contextmanager
    def hook(self) -> Iterator[None]:
        """Receive the keys of the layer inside the context."""
        if self.layer.is_mixture:
            with gated_keys_hook(self.layer.module, self.layer.parameters, self._receive_routed, self.layer.name):
                yield
        else:
            with input_hook(self.layer.module, self._receive):
                yield

    def _receive(self, keys: Tensor) -> None:
        self._check_once()
        keys = as_sequence(keys, self._shape, f"The tensor that flows through {self.layer.name}")
        self._keys.append(keys[:, FIRST_TOKENS:].reshape(-1, keys.shape[-1]))
        if self._is_last:
            keys = torch.cat(self._keys) if len(self._keys) > 1 else self._keys[0]
            self._keys = []
            self._add(keys[: self.count])

    def _receive_routed(self, output: Tensor, found: list[GatedKeys]) -> None:
        self._check_once()
        as_sequence(output, self._shape, f"The output of {self.layer.name}")
        rows, length = self._shape
        # The number of each token among those that are collected, or -1.
        number = torch.full((rows, length), -1)
        number[:, FIRST_TOKENS:] = torch.arange(self._before, self._before + rows * (length - FIRST_TOKENS)).view(
            rows, -1
        )
        number[number >= self.count] = -1
        self._before += rows * (length - FIRST_TOKENS)
        for keys in found:
            kept = (number.view(-1).to(keys.tokens.device)[keys.tokens] >= 0).nonzero().flatten()
            self._routed.append((self.layer.index_of(keys), keys.rows(kept)))
        if self._is_last:
            routed, self._routed = self._routed, []
            self._add(routed)

    def _check_once(self) -> None:
        """Raise InputError if the layer runs more than once in a pass."""
        if self.is_done or self._received > self._piece:
            raise InputError(
                f"{self.layer.name} runs more than once in a forward pass: a token has several keys there."
            )
        self._received += 1

    def _add(self, keys: Tensor | list[tuple[int, GatedKeys]]) -> None:
        try:
            with self.state.adding(self.layer.layer) as sums:
                if isinstance(keys, Tensor):
                    sums.add(keys)
                else:
                    sums.add_routed(keys)
        except torch.cuda.OutOfMemoryError as error:  # not retried: the sum may contain a part of the keys
            raise RocrError(
                f"The GPU ran out of memory at layer {self.layer.layer}: collect fewer layers at a time. {error}"
            ) from error
        self.is_done = True
