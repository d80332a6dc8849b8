"""FP8 in blocks, as DeepSeek-V3 and Qwen3 publish it: weight = e4m3 value times the scale of its block.

Scales are float32 or bfloat16, or powers of two in e8m0: one byte b stands for 2^(b - 127).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rocr.model.quantised.packing import E8M0_BIAS, powers_of_two
from rocr.model.quantised.scheme import Parts, Scheme, block_maxima, spread

LARGEST = 448.0
"""The largest value of e4m3."""


class Fp8(Scheme):
    """FP8 with one scale for each block of the weight, or for the whole weight."""

    label = "FP8"
    packages = ("accelerate",)
    can_dequantise = True
    suffixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": (".weight",),
        "scale": (".weight_scale_inv", ".scale"),
        "activation": (".activation_scale", ".input_scale"),
    }
    marker = "scale"
    optional = frozenset({"activation"})

    def read(self, parts: Parts) -> Tensor:
        """Return the values of a weight; see `Scheme.read`."""
        weight = parts["weight"]
        if weight.dtype != torch.float8_e4m3fn or weight.ndim != 2:
            raise ValueError(f"its weight is {weight.dtype} of shape {tuple(weight.shape)}, not e4m3 of two dimensions")
        scale = _factors(parts["scale"])
        return weight.float() * spread(scale, _shape(weight), self._block(weight, scale))

    def write(self, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Quantise values; a block keeps its scale unless a value would overflow. See `Scheme.write`."""
        weight, stored = parts["weight"], parts["scale"]
        scale = _factors(stored)
        block = self._block(weight, scale)
        least = block_maxima(values, block).reshape(scale.shape) / LARGEST
        grown = _as_stored(least, stored)
        fits = least <= scale
        kept = torch.where(fits, scale, _factors(grown))
        encoded = (values / spread(kept, _shape(weight), block)).clamp(-LARGEST, LARGEST).to(weight.dtype)
        codes = torch.where(fits.reshape(stored.shape), stored, grown)
        return {"weight": encoded, "scale": codes}

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the values; see `Scheme.shape`."""
        return shapes["weight"]

    def _block(self, weight: Tensor, scale: Tensor) -> tuple[int, int]:
        """Return the rows and columns of a block: those of the settings if they fit, else those of an even grid."""
        rows, columns = _shape(weight)
        given: Any = self.settings.get("weight_block_size")
        is_pair = isinstance(given, list) and len(given) == 2 and all(isinstance(n, int) and n > 0 for n in given)
        if is_pair and tuple(scale.shape) == (-(-rows // given[0]), -(-columns // given[1])):
            return given[0], given[1]
        if rows % scale.shape[0] or columns % scale.shape[1]:
            raise ValueError(f"{tuple(scale.shape)} scales do not fit a weight of shape {(rows, columns)}")
        return rows // scale.shape[0], columns // scale.shape[1]


def _factors(scale: Tensor) -> Tensor:
    """Return stored scales as float32 of two dimensions."""
    flat = powers_of_two(scale) if scale.dtype == torch.uint8 else scale.float()
    if flat.ndim > 2 or not flat.numel():
        raise ValueError(f"its scales have the shape {tuple(scale.shape)}")
    return flat if flat.ndim == 2 else flat.reshape(-1, 1)


def _as_stored(scale: Tensor, like: Tensor) -> Tensor:
    """Return float32 scales in a stored dtype, and never smaller."""
    if like.dtype == torch.uint8:
        exponents = scale.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil()
        return (exponents + E8M0_BIAS).clamp(0, 254).to(torch.uint8).reshape(like.shape)
    rounded = scale.to(like.dtype)
    step = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < scale, step, rounded).reshape(like.shape)


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
