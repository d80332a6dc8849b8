"""The interface of a quantisation scheme: the tensors of one weight in the files, and their values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
"""The stored tensors of one weight by their roles, such as "weight" and "scale"."""


@dataclass(frozen=True)
class Scheme(ABC):
    """How the weights of a checkpoint are quantised.

    Subclasses have the formulas of one scheme. They need no library of it.

    Attributes:
        settings: The field quantization_config of config.json.
        label: The name of the scheme in messages and reports.
        packages: The packages without which transformers cannot load the scheme, by the names that pip installs.
        suffixes: For each role, the endings of the tensor's name after the name of the module.
        marker: The role of a tensor that only quantised weights have.
        optional: Roles that a quantised weight may lack.
        skipped: The field of `settings` that lists modules that are not quantised.
        can_dequantise: Whether transformers can load the experts of a mixture as plain weights, with `dequantize` in
            `settings`, and also loads a checkpoint in which those of some layers are stored unquantised.
        runs_first: Whether the library makes its modules ready when the model runs for the first time.
    """

    settings: Mapping[str, Any]

    label: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[Mapping[str, tuple[str, ...]]]
    marker: ClassVar[str]
    optional: ClassVar[frozenset[str]] = frozenset()
    skipped: ClassVar[str] = "modules_to_not_convert"
    can_dequantise: ClassVar[bool] = False
    runs_first: ClassVar[bool] = False

    @abstractmethod
    def read(self, parts: Parts) -> Tensor:
        """Return the values of a weight, (d_out, d_in) float32.

        Raises:
            ValueError: The parts do not fit each other or the settings.
        """

    @abstractmethod
    def write(self, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Quantise values to the same scheme, as near as possible with few changes of the scales.

        Args:
            values: (d_out, d_in) float32.
            parts: The parts that are replaced.

        Returns:
            The parts that change, by role, each of the dtype and shape of the replaced one.
        """

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """Return the shape of the values of a weight from those of its parts by role; None if they do not tell it."""
        return None

    def modules(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Return the quantised modules among the names of stored tensors: for each the names of its parts by role."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            for ending in self.suffixes[self.marker]:
                if name.endswith(ending):
                    module = name.removesuffix(ending)
                    parts = self._parts(module, names)
                    if parts is not None:
                        found[module] = parts
        return found

    def weight_name(self, module: str) -> str:
        """Return the name that a weight has in a checkpoint that is not quantised."""
        return f"{module}.weight"

    def without(self, modules: Sequence[str], plain: Sequence[str], quantised: Sequence[str]) -> dict[str, Any]:
        """Return the settings of a checkpoint in which some modules are no longer quantised.

        Args:
            modules: The names of the modules in the files.
            plain: The modules that were not quantised before. A list of modules replaces the default of loaders, so
                that a new list has to name these too.
            quantised: The modules that were quantised before.
        """
        listed = self.settings.get(self.skipped)
        before = list(listed) if listed else list(plain)
        return dict(self.settings) | {self.skipped: [*before, *(name for name in modules if name not in before)]}

    def _parts(self, module: str, names: Collection[str]) -> dict[str, str] | None:
        parts = {
            role: module + ending
            for role, endings in self.suffixes.items()
            for ending in endings
            if module + ending in names
        }
        return parts if {*self.suffixes} - self.optional <= {*parts} else None


def nearest(values: Tensor, table: Tensor, before: Tensor) -> Tensor:
    """Return for each value the index of the nearest entry of a table, as int64.

    Args:
        values: Values of any shape, float32.
        table: (n) float32 entries in any order.
        before: Indices that are kept where the nearest entry is equal to theirs, such as 0 and -0.
    """
    ordered, order = table.sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    found = order[torch.bucketize(values.contiguous(), middles)]
    return torch.where(table[found] == table[before], before, found)


def spread(scales: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Repeat the scale of each block over the entries of the block.

    Args:
        scales: (rows of blocks, columns of blocks).
        shape: The shape of the weight. Its last blocks may be incomplete.
        block: The rows and columns of a block.
    """
    rows, columns = shape
    return scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def block_maxima(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the largest absolute value of each block of a matrix; the last blocks may be incomplete."""
    rows, columns = values.shape
    padding = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(values.abs(), padding)
    high, wide = padded.shape[0] // block[0], padded.shape[1] // block[1]
    maxima: Tensor = padded.reshape(high, block[0], wide, block[1]).amax(dim=(1, 3))
    return maxima
