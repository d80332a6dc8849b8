"""The factors of an update: Δ = left @ right, where a factor that is the identity is not stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """An update Δ (d_out, d_in).

    Attributes:
        stored_left: (d_out, r) float32; None: the identity, so that `stored_right` is Δ itself.
        stored_right: (r, d_in) float32; None: the identity, so that `stored_left` is Δ itself.
    """

    stored_left: Tensor | None
    stored_right: Tensor | None

    def __post_init__(self) -> None:
        if self.stored_left is None and self.stored_right is None:
            raise ValueError("an update has at least one factor")

    @classmethod
    def of_matrix(cls, update: Tensor) -> Factors:
        """Of an update (d_out, d_in) that is at hand as a whole."""
        return cls(None, update) if update.shape[0] <= update.shape[1] else cls(update, None)

    @property
    def left(self) -> Tensor:
        """(d_out, r); an identity is made anew at each call."""
        return _identity_beside(self.stored_right, 0) if self.stored_left is None else self.stored_left

    @property
    def right(self) -> Tensor:
        """(r, d_in); an identity is made anew at each call."""
        return _identity_beside(self.stored_left, 1) if self.stored_right is None else self.stored_right

    @property
    def matrix(self) -> Tensor | None:
        """Δ itself where it is stored as a whole; None where it is a product."""
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
        """What the update adds to a weight's outputs at keys (n, d_in): (n, d_out), in the dtype of the keys."""
        for factor in (self.stored_right, self.stored_left):
            if factor is not None:
                keys = keys @ factor.to(keys).T
        return keys

    def norm(self) -> float:
        """Frobenius norm of Δ, which is never formed."""
        matrix = self.matrix
        if matrix is not None:
            return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _identity_beside(other: Tensor | None, side: int) -> Tensor:
    assert other is not None, "only one factor can be the identity"
    return torch.eye(other.shape[side], dtype=other.dtype, device=other.device)
