"""Means of the gated keys of a mixture of experts over the groups of a reading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.keys.batches import Batch
from rocr.keys.plan import Reading
from rocr.model.blocks import LayerBlocks
from rocr.model.gated_keys import GatedKeys


@dataclass(frozen=True)
class Routing:
    """To which blocks of a layer the read tokens of each group are routed.

    Attributes:
        blocks: Indices of the blocks that at least one read token is routed to, ascending.
        weights: (groups, blocks) float32, the sum of the absolute gates of the group's tokens.
        tokens: (groups, blocks) int64, the number of the group's tokens that are routed to the block.
        of: (groups,) int64, the number of the group's tokens.
    """

    blocks: tuple[int, ...]
    weights: Tensor
    tokens: Tensor
    of: Tensor


class RoutedMeans:
    """Running means of wide keys: the gated keys of each block, zero where a token is not routed to it.

    They are summed on the CPU, where the order of the sums is fixed, and kept for blocks that a read token is routed
    to.
    """

    def __init__(self, reading: Reading, layer: LayerBlocks) -> None:
        self._layer = layer
        self._groups = reading.groups
        self._tokens: dict[int, list[int]] = {}
        for token, prompt in enumerate(reading.prompt_of):
            self._tokens.setdefault(prompt, []).append(token)
        self._reading = reading
        self._of = torch.bincount(torch.tensor(reading.group_of), minlength=reading.groups)
        self._sums: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    def add(self, found: Iterable[GatedKeys], batch: Batch) -> None:
        """Add the read tokens of a batch, given the gated keys of all its tokens."""
        places, groups = self._read_in(batch)
        for keys in found:
            block = self._layer.index_of(keys)
            row_of = torch.full((batch.tokens.numel(),), -1)
            row_of[keys.tokens.cpu()] = torch.arange(len(keys.tokens))
            rows = row_of[places]
            is_routed = rows >= 0
            if not is_routed.any():
                continue
            rows, own = rows[is_routed].to(keys.inputs.device), groups[is_routed]
            values = (keys.inputs[rows].float() * keys.gates[rows, None]).cpu() / self._of[own, None]
            if block not in self._sums:
                self._sums[block] = torch.zeros(self._groups, values.shape[1])
                self._weights[block] = torch.zeros(self._groups)
                self._counts[block] = torch.zeros(self._groups, dtype=torch.int64)
            self._sums[block].index_add_(0, own, values)
            self._weights[block].index_add_(0, own, keys.gates[rows].abs().cpu())
            self._counts[block].index_add_(0, own, torch.ones_like(own))

    def result(self) -> tuple[Tensor, Routing]:
        """Return the means (groups, sum of d_in over the touched blocks), on the layer's device, and the routing."""
        blocks = tuple(sorted(self._sums))
        if not blocks:
            empty = torch.zeros(self._groups, 0)
            return empty, Routing((), empty, empty.long(), self._of)
        means = torch.cat([self._sums.pop(block) for block in blocks], dim=1).to(self._layer.device)
        weights = torch.stack([self._weights[block] for block in blocks], dim=1)
        tokens = torch.stack([self._counts[block] for block in blocks], dim=1)
        return means, Routing(blocks, weights, tokens, self._of)

    def _read_in(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the index of each read token of a batch, counted over (batch, tokens), and its group."""
        length, skipped = batch.tokens.shape[1], len(batch.prefix)
        pairs = [
            (row * length + self._reading.position_of[token] - skipped, self._reading.group_of[token])
            for row, prompt in enumerate(batch.prompts)
            for token in self._tokens.get(prompt, ())
        ]
        places, groups = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(dim=1)
        return places, groups
