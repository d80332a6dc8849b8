"""MXFP4 of gpt-oss: the experts of a layer in one tensor, in blocks of 32 4-bit floats with one power of two each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from rocr.model.quantised.packing import E8M0_BIAS, e2m1_table, pack_nibbles, powers_of_two, unpack_nibbles
from rocr.model.quantised.scheme import Parts, Scheme, nearest

LARGEST = 6.0
BLOCK = 32


class Mxfp4(Scheme):
    """Experts in blocks of 32 inputs: blocks (experts, d_out, d_in / 32, 16) and scales (experts, d_out, d_in / 32).

    The model's parameter is transposed: (experts, d_in, d_out).
    """

    label = "MXFP4"
    packages = ("accelerate",)
    can_dequantise = True
    suffixes: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": ("_blocks",), "scale": ("_scales",)}
    marker = "weight"

    def weight_name(self, module: str) -> str:
        """Return the name of the dense weight: the experts are a parameter, not a module."""
        return module

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return (experts, d_in, d_out); see `Scheme.shape`."""
        experts, outputs, *blocks = shapes["weight"]
        return experts, 2 * math.prod(blocks), outputs

    def read(self, parts: Parts) -> Tensor:
        """Return the values of all experts, (experts, d_in, d_out); see `Scheme.read`."""
        blocks, scale = parts["weight"], _scale(parts)
        values = e2m1_table()[unpack_nibbles(blocks)] * scale.unsqueeze(-1)
        return values.flatten(-2).transpose(1, 2).contiguous()

    def write(self, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Quantise values; a block keeps its scale unless a value would overflow. See `Scheme.write`."""
        blocks = values.transpose(1, 2).reshape(*parts["scale"].shape, BLOCK)
        before = _scale(parts)
        least = blocks.abs().amax(dim=-1) / LARGEST
        # Up to 7 rounds to 6, so that a block grows only if it must.
        fits = least <= before * (7 / LARGEST)
        grown = (least.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil() + E8M0_BIAS).clamp(0, 254)
        codes = torch.where(fits, parts["scale"].float(), grown).to(torch.uint8)
        scaled = blocks / powers_of_two(codes).unsqueeze(-1)
        found = nearest(scaled, e2m1_table(), unpack_nibbles(parts["weight"]))
        return {"weight": pack_nibbles(found), "scale": codes}


def _scale(parts: Parts) -> Tensor:
    """Return the scale of each block, float32."""
    blocks, scale = parts["weight"], parts["scale"]
    if blocks.ndim != 4 or blocks.shape[:3] != scale.shape or blocks.shape[3] != BLOCK // 2:
        raise ValueError(f"its blocks have the shape {tuple(blocks.shape)}, and its scales {tuple(scale.shape)}")
    return powers_of_two(scale)
