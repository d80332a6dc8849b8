"""The running sums of a collection of statistics: a second moment of each dense layer and of each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr import ops
from rocr.errors import GuardError
from rocr.model.blocks import LayerBlocks
from rocr.model.gated_keys import GatedKeys
from rocr.statistics.statistics import MixtureMoments


@dataclass(frozen=True)
class LayerSums:
    """The sums of the second moments of one layer's keys.

    Attributes:
        totals: (blocks, d_in, d_in) float32, one tensor for all blocks of one width; (d_in, d_in) for a dense layer.
        members: For each of `totals` of a mixture, the indices of its blocks in the layer. Empty for a dense layer.
        routed: (blocks,) int64, the number of tokens that were routed to each block of a mixture. None: dense.
    """

    totals: tuple[Tensor, ...]
    members: tuple[tuple[int, ...], ...] = ()
    routed: Tensor | None = None

    @classmethod
    def zeros(cls, layer: LayerBlocks) -> LayerSums:
        """Return sums of zero for a layer."""
        if not layer.is_mixture:
            width = layer.widths[0]
            return cls((torch.zeros(width, width, device=layer.device),))
        by_width: dict[int, list[int]] = {}
        for block, width in enumerate(layer.widths):
            by_width.setdefault(width, []).append(block)
        totals = tuple(
            torch.zeros(len(blocks), width, width, device=layer.device) for width, blocks in by_width.items()
        )
        members = tuple(map(tuple, by_width.values()))
        return cls(totals, members, torch.zeros(len(layer.blocks), dtype=torch.int64))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that a checkpoint holds."""
        return self.totals if self.routed is None else (*self.totals, self.routed)

    @property
    def matrices(self) -> list[Tensor]:
        """The sum of each block, (d_in, d_in), in the order of `totals`."""
        return [matrix for total in self.totals for matrix in (total if total.ndim == 3 else total[None])]

    def add(self, keys: Tensor) -> None:
        """Add the keys (t, d_in) of a dense layer."""
        ops.accumulate_second_moment(self.totals[0], keys)

    def add_routed(self, found: Sequence[tuple[int, GatedKeys]]) -> None:
        """Add the gated keys of a mixture, each with the index of its block."""
        assert self.routed is not None, "only a mixture has gated keys"
        for total, blocks in zip(self.totals, self.members, strict=True):
            place = {block: i for i, block in enumerate(blocks)}
            own = sorted(((place[block], keys) for block, keys in found if block in place), key=lambda pair: pair[0])
            if not own:
                continue
            counts = torch.zeros(len(blocks), dtype=torch.int64)
            for i, keys in own:
                counts[i] += len(keys.tokens)
                self.routed[blocks[i]] += len(keys.tokens)
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
            gated = torch.cat([keys.inputs * keys.gates[:, None].to(keys.inputs) for _, keys in own])
            ops.accumulate_grouped_second_moment(total, gated, offsets)

    def finished(self, tokens: int, layer: int) -> Tensor | MixtureMoments:
        """Return the mean second moments of a layer, in place of the sums.

        Raises:
            GuardError: Keys were not finite, or all keys of the layer were zero.
        """
        for total in self.matrices:
            ops.symmetrize(total)
            if not torch.isfinite(total.diagonal()).all():
                raise GuardError(
                    f"Some keys of layer {layer} are not finite: the model overflows on this text. "
                    "Load it in float32 or bfloat16."
                )
            total.div_(tokens)
        if not any(total.any() for total in self.totals):
            raise GuardError(
                f"All keys of layer {layer} are zero on this text, so there is no metric. "
                "Choose other layers, or give more text."
            )
        if self.routed is None:
            return self.totals[0]
        order = [block for blocks in self.members for block in blocks]
        by_block = dict(zip(order, self.matrices, strict=True))
        return MixtureMoments(tuple(by_block[block] for block in sorted(by_block)), self.routed)
