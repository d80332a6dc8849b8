"""compressed-tensors, as llm-compressor writes it: packed integers, int8, FP8, NVFP4 and MXFP4.

The parts of a weight tell its format, so that a checkpoint may mix formats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rocr.model.quantised.packing import (
    e2m1_table,
    pack_nibbles,
    pack_words,
    powers_of_two,
    unpack_nibbles,
    unpack_words,
)
from rocr.model.quantised.scheme import Parts, Scheme, block_maxima, nearest, spread

LARGEST_FP8 = 448.0


class CompressedTensors(Scheme):
    """Weights of compressed-tensors: weight = (code - zero point) times the scale of its row, group or block."""

    label = "compressed-tensors"
    packages = ("compressed-tensors", "accelerate")
    skipped = "ignore"
    runs_first = True
    suffixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "packed": (".weight_packed",),
        "weight": (".weight",),
        "scale": (".weight_scale",),
        "zero": (".weight_zero_point",),
        "shape": (".weight_shape",),
        "global": (".weight_global_scale",),
        "groups": (".weight_g_idx",),
        "input_scale": (".input_scale",),
        "input_zero": (".input_zero_point",),
        "input_global": (".input_global_scale",),
    }
    marker = "scale"
    optional = frozenset(suffixes) - {"scale"}

    def read(self, parts: Parts) -> Tensor:
        """Return the values of a weight; see `Scheme.read`."""
        scale = _scales(parts)
        return (_codes(parts) - _zeros(parts, scale)) * scale

    def write(self, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Quantise values. Scales of FP8 and int8 grow where a value would overflow. See `Scheme.write`."""
        scale = _scales(parts)
        if "packed" not in parts:
            return _whole_codes(values, parts)
        packed = parts["packed"]
        ratio = values / torch.where(scale == 0, torch.ones_like(scale), scale)
        if packed.dtype == torch.uint8:
            return {"packed": pack_nibbles(nearest(ratio, e2m1_table(), unpack_nibbles(packed)))}
        bits = _bits(parts)
        half = 1 << bits - 1
        codes = (ratio + _zeros(parts, scale)).round().clamp(-half, half - 1) + half
        return {"packed": pack_words(codes, bits)}

    def without(self, modules: Sequence[str], plain: Sequence[str], quantised: Sequence[str]) -> dict[str, Any]:
        """Return the settings with more ignored modules; the list has no default. See `Scheme.without`."""
        return super().without(modules, (), quantised)

    def _parts(self, module: str, names: Collection[str]) -> dict[str, str] | None:
        parts = super()._parts(module, names)
        return parts if parts is not None and ("packed" in parts) != ("weight" in parts) else None


def _codes(parts: Parts) -> Tensor:
    """Return the codes of a weight as float32 (d_out, d_in): integers, or values of small floats."""
    packed = parts.get("packed")
    if packed is None:
        if parts["weight"].ndim != 2 or parts["weight"].dtype not in (torch.float8_e4m3fn, torch.int8):
            raise ValueError(f"its weight is {parts['weight'].dtype}, not e4m3 or int8 of two dimensions")
        return parts["weight"].float()
    if packed.dtype == torch.uint8:
        return e2m1_table()[unpack_nibbles(packed)]
    bits = _bits(parts)
    return (unpack_words(packed, bits, _shape(parts)[1]) - (1 << bits - 1)).float()


def _shape(parts: Parts) -> tuple[int, int]:
    """Return (d_out, d_in)."""
    packed = parts.get("packed")
    if packed is None:
        return parts["weight"].shape[0], parts["weight"].shape[1]
    if packed.dtype == torch.uint8:
        return packed.shape[0], 2 * packed.shape[1]
    rows, columns = (int(size) for size in parts["shape"].reshape(-1))
    if packed.dtype != torch.int32 or packed.ndim != 2 or rows != packed.shape[0] or columns < 1:
        raise ValueError(f"its weight_packed is {packed.dtype} of shape {tuple(packed.shape)} for {rows} x {columns}")
    return rows, columns


def _bits(parts: Parts) -> int:
    """Return the bits of a packed integer: those with which its words have room for the row, and no more."""
    columns, words = _shape(parts)[1], parts["packed"].shape[1]
    for bits in (1, 2, 4, 8):
        if words == -(-columns * bits // 32):
            return bits
    raise ValueError(f"{words} words do not hold {columns} integers of 1, 2, 4 or 8 bits")


def _block(parts: Parts, grid: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a block that has one scale."""
    rows, columns = _shape(parts)
    if grid.shape[0] < 1 or grid.shape[1] < 1:
        raise ValueError("it has no scales")
    block = -(-rows // grid.shape[0]), -(-columns // grid.shape[1])
    if tuple(grid.shape) != (-(-rows // block[0]), -(-columns // block[1])):
        raise ValueError(f"{tuple(grid.shape)} scales do not fit a weight of shape {(rows, columns)}")
    return block


def _grid(stored: Tensor) -> Tensor:
    """Return scales as float32 of two dimensions; bytes are powers of two."""
    values = powers_of_two(stored) if stored.dtype == torch.uint8 else stored.float()
    return values if values.ndim == 2 else values.reshape(-1, 1)


def _scales(parts: Parts) -> Tensor:
    """Return the scale of each entry, float32 (d_out, d_in)."""
    grid = _grid(parts["scale"])
    if "global" in parts:
        grid = grid / parts["global"].float().reshape(-1)[0]
    groups = parts.get("groups")
    if groups is not None and bool((groups >= 0).all()):
        return grid[:, groups.long()]
    return spread(grid, _shape(parts), _block(parts, grid))


def _zeros(parts: Parts, scale: Tensor) -> Tensor | float:
    """Return the zero point of each entry, or 0."""
    zero = parts.get("zero")
    if zero is None:
        return 0.0
    grid = _grid(parts["scale"])
    if zero.dtype == torch.int32 and "packed" in parts:
        bits = _bits(parts)
        unpacked = unpack_words(zero.T.contiguous(), bits, len(scale)).T - (1 << bits - 1)
    else:
        unpacked = zero.reshape(grid.shape)
    if tuple(unpacked.shape) != tuple(grid.shape):
        raise ValueError(f"{tuple(unpacked.shape)} zero points do not fit {tuple(grid.shape)} scales")
    return spread(unpacked.float(), _shape(parts), _block(parts, grid))


def _whole_codes(values: Tensor, parts: Parts) -> dict[str, Tensor]:
    """Quantise to one byte for each entry."""
    weight, stored = parts["weight"], parts["scale"]
    smallest, largest = (-128.0, 127.0) if weight.dtype == torch.int8 else (-LARGEST_FP8, LARGEST_FP8)
    grid = _grid(stored)
    block = _block(parts, grid)
    if "zero" in parts:
        ratio = values / _scales(parts) + _zeros(parts, values)
        return {"weight": ratio.round().clamp(smallest, largest).to(weight.dtype)}
    least = block_maxima(values.clamp(min=0), block) / largest
    least = torch.maximum(least, block_maxima(values.clamp(max=0), block) / -smallest)
    grown = least.to(stored.dtype)
    grown = torch.where(grown.float() < least, torch.nextafter(grown, torch.full_like(grown, torch.inf)), grown)
    kept = torch.where(least <= grid, stored.reshape(grid.shape), grown)
    ratio = values / spread(kept.float(), _shape(parts), block)
    codes = ratio if weight.dtype == torch.float8_e4m3fn else ratio.round()
    return {"weight": codes.clamp(smallest, largest).to(weight.dtype), "scale": kept.reshape(stored.shape)}
