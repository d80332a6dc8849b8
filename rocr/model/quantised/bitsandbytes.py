"""bitsandbytes in 4 bits (NF4 and FP4, with and without double quantisation) and 8 bits (LLM.int8)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rocr.io.json_values import list_of, whole_number_of
from rocr.model.quantised.packing import pack_nibbles, unpack_nibbles
from rocr.model.quantised.scheme import Parts, Scheme, nearest

LARGEST_INT8 = 127


class BitsAndBytes4(Scheme):
    """Blocks of consecutive entries: weight = table entry of the 4-bit code times the largest value of the block.

    With double quantisation, the largest values are 8-bit codes themselves, in blocks of their own.
    """

    label = "bitsandbytes 4 bit"
    packages = ("bitsandbytes", "accelerate")
    skipped = "llm_int8_skip_modules"
    suffixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": (".weight",),
        "absmax": (".weight.absmax",),
        "map": (".weight.quant_map",),
        "state": (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4"),
        "nested_absmax": (".weight.nested_absmax",),
        "nested_map": (".weight.nested_quant_map",),
    }
    marker = "absmax"
    optional = frozenset({"nested_absmax", "nested_map"})

    def read(self, parts: Parts) -> Tensor:
        """Return the values of a weight; see `Scheme.read`."""
        state = _state(parts)
        rows, columns = state["shape"]
        codes = unpack_nibbles(parts["weight"].reshape(-1), high_first=True)[: rows * columns]
        return (parts["map"].float()[codes] * _scales(parts, state, rows * columns)).reshape(rows, columns)

    def write(self, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Quantise values with the scales that the blocks have; larger values are clipped. See `Scheme.write`."""
        state = _state(parts)
        flat = values.reshape(-1)
        scales = _scales(parts, state, flat.numel())
        before = unpack_nibbles(parts["weight"].reshape(-1), high_first=True)
        ratio = flat / scales.clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.cat([nearest(ratio, parts["map"].float(), before[: len(ratio)]), before[len(ratio) :]])
        return {"weight": pack_nibbles(codes, high_first=True).reshape(parts["weight"].shape)}


class BitsAndBytes8(Scheme):
    """One scale for each row: weight = int8 value times the scale / 127."""

    label = "bitsandbytes 8 bit"
    packages = ("bitsandbytes", "accelerate")
    skipped = "llm_int8_skip_modules"
    suffixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": (".weight",),
        "scale": (".SCB",),
        "format": (".weight_format",),
    }
    marker = "scale"
    optional = frozenset({"format"})

    def read(self, parts: Parts) -> Tensor:
        """Return the values of a weight; see `Scheme.read`."""
        return parts["weight"].float() * _row_scales(parts)

    def write(self, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Quantise values; a row keeps its scale unless a value would overflow. See `Scheme.write`."""
        before = parts["scale"].float().reshape(-1)
        scale = torch.maximum(before, values.abs().amax(dim=1))
        codes = (values / scale.clamp(min=1e-30)[:, None] * LARGEST_INT8).round()
        codes = codes.clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
        return {"weight": codes, "scale": scale.to(parts["scale"].dtype).reshape(parts["scale"].shape)}


def _row_scales(parts: Parts) -> Tensor:
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype != torch.int8 or weight.ndim != 2 or scale.numel() != len(weight):
        raise ValueError(
            f"its weight is {weight.dtype} of shape {tuple(weight.shape)}, with {scale.numel()} scales, not int8 with "
            "one scale for each row"
        )
    layout = parts.get("format")
    if layout is not None and int(layout.reshape(-1)[0]) != 0:
        raise ValueError(f"its weight_format is {int(layout.reshape(-1)[0])}, not 0, which is row by row")
    return scale.float().reshape(-1, 1) / LARGEST_INT8


def _state(parts: Parts) -> dict[str, Any]:
    """Return the settings that a weight carries, with a shape of two dimensions and block sizes of at least 1."""
    state = json.loads(bytes(parts["state"].tolist()))
    shape = [whole_number_of(size, "a length") for size in list_of(state["shape"], "shape")]
    state["shape"] = shape
    if len(shape) != 2 or not 0 < shape[0] * shape[1] <= 2 * parts["weight"].numel():
        raise ValueError(f"its shape is {shape}, with {parts['weight'].numel()} bytes")
    for name in ("blocksize", *(("nested_blocksize",) if "nested_absmax" in parts else ())):
        if whole_number_of(state[name], name) < 1:
            raise ValueError(f"its {name} is {state[name]}")
    return dict(state)


def _scales(parts: Parts, state: dict[str, Any], count: int) -> Tensor:
    """Return the scale of each entry, float32."""
    absmax = parts["absmax"].reshape(-1)
    if "nested_absmax" in parts and "nested_map" in parts:
        outer = parts["nested_absmax"].float().repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
        absmax = parts["nested_map"].float()[absmax.long()] * outer + float(state["nested_offset"])
    scales = absmax.float().repeat_interleave(state["blocksize"])
    if scales.numel() < count:
        raise ValueError(f"it has {absmax.numel()} blocks of {state['blocksize']} for {count} entries")
    return scales[:count]
