"""The factors of an update, Δ = left @ right, or its part on a support. An identity matrix is not stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Largest number of elements of an update on a support that are computed at a time (128 MiB in float64)."""


@dataclass(frozen=True)
class Factors:
    """An update Δ (d_out, d_in).

    Attributes:
        stored_left: (d_out, r) float32. None is the identity: `stored_right` is then Δ itself.
        stored_right: (r, d_in) float32. None is the identity: `stored_left` is then Δ itself.
        support: (d_out, d_in) bool, the elements of the product that belong to Δ; the others of Δ are zero. None for
            all of them.

    Raises:
        ValueError: Both factors are None, or one of them with a support.
    """

    stored_left: Tensor | None
    stored_right: Tensor | None
    support: Tensor | None = None

    def __post_init__(self) -> None:
        missing = (self.stored_left is None) + (self.stored_right is None)
        if missing > (self.support is None):
            raise ValueError("stored_left and stored_right cannot both be None, and with a support neither can")

    @classmethod
    def of_matrix(cls, update: Tensor) -> Factors:
        """Return the factors of an update (d_out, d_in) that is one matrix."""
        return cls(None, update) if update.shape[0] <= update.shape[1] else cls(update, None)

    @property
    def left(self) -> Tensor:
        """(d_out, r) float32. An identity matrix is allocated at each access."""
        return _identity_beside(self.stored_right, 0) if self.stored_left is None else self.stored_left

    @property
    def right(self) -> Tensor:
        """(r, d_in) float32. An identity matrix is allocated at each access."""
        return _identity_beside(self.stored_left, 1) if self.stored_right is None else self.stored_right

    @property
    def matrix(self) -> Tensor | None:
        """Δ itself if it is stored as one matrix, or None if it is stored as a product."""
        if self.stored_left is None:
            return self.stored_right
        return self.stored_left if self.stored_right is None else None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        matrix = self.matrix
        rows, columns = (self.left, self.right) if matrix is None else (matrix, matrix)
        return rows.shape[0], columns.shape[1]

    @property
    def rank(self) -> int:
        """The inner size r of the product."""
        return min(self.shape) if self.matrix is not None else self.left.shape[1]

    def moves(self, keys: Tensor) -> Tensor:
        """Return keys @ Δᵀ (n, d_out), the change of the outputs at keys (n, d_in), in the dtype of the keys."""
        if self.support is not None:
            return torch.cat([keys @ rows.to(keys).T for rows in self._rows_on_support()], dim=1)
        for factor in (self.stored_right, self.stored_left):
            if factor is not None:
                keys = keys @ factor.to(keys).T
        return keys

    def norm(self) -> float:
        """Return the Frobenius norm of Δ, without computing the product unless it has a support."""
        if self.support is not None:
            squares = [torch.linalg.vector_norm(rows, dtype=torch.float64).square() for rows in self._rows_on_support()]
            return float(torch.stack(squares).sum().sqrt())
        matrix = self.matrix
        if matrix is not None:
            return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())

    def _rows_on_support(self) -> Iterator[Tensor]:
        """Yield some rows of Δ at a time, float32."""
        assert self.support is not None
        step = max(1, CHUNK_ELEMENTS // max(1, self.support.shape[1]))
        for start in range(0, len(self.support), step):
            rows = slice(start, start + step)
            yield (self.left[rows] @ self.right).mul_(self.support[rows])


def _identity_beside(other: Tensor | None, side: int) -> Tensor:
    """Return the identity matrix that is multiplied with the other factor, on side 0 (left) or 1 (right) of it."""
    assert other is not None, "only one factor can be the identity"
    return torch.eye(other.shape[side], dtype=other.dtype, device=other.device)
