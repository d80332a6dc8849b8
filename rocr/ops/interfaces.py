"""The interfaces of the modules rocr.ops.*_backend, whose operands are checked before a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Backend(Protocol):
    """The interface of every backend."""

    def is_available(self, device: torch.device) -> bool:
        """Return whether the backend is built and runs on the device."""
        ...

    def accumulate_second_moment(self, total: Tensor, keys: Tensor) -> None:
        """Add keysᵀ keys to the lower triangle of total; keys have unit stride along a row."""
        ...


@runtime_checkable
class UpdateBackend(Protocol):
    """The interface of a backend that updates weights."""

    def low_rank_update(
        self,
        weights: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        scale: float,
        rounding: str,
        seed: int,
        keep_zeros: bool = False,
    ) -> None:
        """Add scale * left @ right to each weight; factors are float32 and contiguous.

        With `keep_zeros`, elements of a weight that are zero keep their bits.
        """
        ...


@runtime_checkable
class LayersBackend(Protocol):
    """The interface of a backend that computes the second moments of several layers in one call."""

    def accumulate_second_moments(self, totals: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Add keysᵀ keys to the lower triangle of each total."""
        ...


@runtime_checkable
class GroupsBackend(Protocol):
    """The interface of a backend that computes the second moments of groups of rows."""

    def accumulate_grouped_second_moment(self, totals: Tensor, keys: Tensor, offsets: Sequence[int]) -> None:
        """Add the second moment of rows offsets[e] to offsets[e + 1] of keys to the lower triangle of totals[e]."""
        ...


@runtime_checkable
class SupportBackend(Protocol):
    """The interface of a backend that solves the update of a weight on its support: where it is not zero."""

    def solve_on_support(self, weight: Tensor, keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> Tensor:
        """Return the coefficients (d_out, m) float32; keys, residuals and basis are float32 and contiguous."""
        ...
