"""Where a quantised checkpoint holds a weight that is edited: a quantised weight, or one expert of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rocr.model.quantised.checkpoint import QuantisedWeight


@dataclass(frozen=True)
class QuantisedPlace:
    """Where the files hold an edited weight.

    Attributes:
        weight: The quantised weight.
        shape: The shape of the edited weight as the model holds it.
        expert: The index of the expert in the quantised weight. None if it holds the edited weight only.
        flipped: Whether the files hold the transpose of what the model holds.
    """

    weight: QuantisedWeight
    shape: tuple[int, ...]
    expert: int | None = None
    flipped: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the edited weight as the files hold it, without the dimension of the experts."""
        return self.shape[::-1] if self.flipped else self.shape

    def parts(self) -> dict[str, Tensor]:
        """Read the parts; of an expert, its own ones with a first dimension of 1."""
        if self.expert is None:
            return self.weight.parts()
        return self.weight.parts_of(self.expert)

    def read(self, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the values as the model holds them, float32; see `QuantisedWeight.read`."""
        parts = self.parts() if parts is None else parts
        if self.expert is None:
            values = self.weight.read(self.stored_shape, parts)
        else:
            values = self.weight.read((1, *self.stored_shape), parts)[0]
        return values.T.contiguous() if self.flipped else values

    def write(self, values: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all parts with values, as the model holds them, quantised to the same scheme.

        Args:
            values: The values, float32.
            parts: The parts before, as `parts` returns them.
        """
        stored = values.T.contiguous() if self.flipped else values
        return {**parts, **self.weight.scheme.write(stored if self.expert is None else stored[None], parts)}

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Put values, as the model holds them, into the plain values of the whole quantised weight."""
        place = whole if self.expert is None else whole[self.expert]
        place.copy_(values.T if self.flipped else values)

    def put_parts(self, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Put the parts of an expert into those of the whole quantised weight."""
        assert self.expert is not None, "a weight of its own needs no merge"
        for role, values in parts.items():
            whole[role][self.expert].view(torch.uint8).copy_(values[0].view(torch.uint8))
