"""GPTQ and AWQ: 4-bit integers in int32 words, with scales and zero points of groups of inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rocr.model.quantised.packing import pack_words, unpack_words
from rocr.model.quantised.scheme import Parts, Scheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each 4-bit field of a word of AWQ stands for, from the lowest bits on."""
EXCLUDED = "-:"
"""The prefix of a pattern of modules that are not quantised, in the setting `dynamic` of GPTQ."""


class Gptq(Scheme):
    """GPTQ: words along the inputs; weight = (code - zero point) times the scale of the group of its input."""

    label = "GPTQ"
    packages = ("gptqmodel", "optimum", "accelerate")
    runs_first = True
    suffixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": (".qweight",),
        "zeros": (".qzeros",),
        "scales": (".scales",),
        "groups": (".g_idx",),
    }
    marker = "weight"
    optional = frozenset({"groups"})

    def read(self, parts: Parts) -> Tensor:
        """Return the values of a weight; see `Scheme.read`."""
        codes = unpack_words(parts["weight"].T.contiguous(), self._bits(), _inputs(parts, self._bits()))
        scales, zeros = self._grid(parts)
        return (codes - zeros) * scales

    def write(self, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Quantise values with the scales that the groups have; larger values are clipped. See `Scheme.write`."""
        scales, zeros = self._grid(parts)
        bits = self._bits()
        codes = (values / torch.where(scales == 0, torch.ones_like(scales), scales) + zeros).round()
        return {"weight": pack_words(codes.clamp(0, (1 << bits) - 1), bits).T.contiguous()}

    def without(self, modules: Sequence[str], plain: Sequence[str], quantised: Sequence[str]) -> dict[str, Any]:
        """Return the settings in which some modules are not quantised; see `Scheme.without`.

        gptqmodel and vLLM read the patterns of excluded modules in `dynamic`, optimum the list of those that remain.
        """
        dynamic = self.settings.get("dynamic")
        excluded: dict[str, Any] = {f"{EXCLUDED}^{re.escape(name)}$": {} for name in modules}
        remaining = [name for name in quantised if name not in modules]
        return dict(self.settings) | {
            "dynamic": excluded | (dynamic if isinstance(dynamic, dict) else {}),
            "modules_in_block_to_quantize": [remaining],
        }

    def _bits(self) -> int:
        bits = self.settings.get("bits")
        if bits not in (2, 4, 8):
            raise ValueError(f"it has {bits!r} bits, and rocr reads 2, 4 and 8")
        return int(bits)

    def _grid(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point of each entry, float32 (d_out, d_in)."""
        inputs, bits = _inputs(parts, self._bits()), self._bits()
        scales = parts["scales"].float()
        zeros = unpack_words(parts["zeros"], bits, scales.shape[1])
        if self.settings.get("checkpoint_format", "gptq") != "gptq_v2":
            zeros = zeros + 1  # the first format stores them less 1
        groups = parts.get("groups")
        if groups is None:
            groups = torch.arange(inputs) // -(-inputs // len(scales))
        return scales[groups.long()].T, zeros[groups.long()].T.float()


class Awq(Scheme):
    """AWQ: words along the outputs, in an order of their own; weight = (code - zero point) times a scale."""

    label = "AWQ"
    packages = ("gptqmodel", "accelerate")
    runs_first = True
    suffixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": (".qweight",),
        "zeros": (".qzeros",),
        "scales": (".scales",),
    }
    marker = "weight"

    def read(self, parts: Parts) -> Tensor:
        """Return the values of a weight; see `Scheme.read`."""
        scales, zeros = self._grid(parts)
        return ((_awq_codes(parts["weight"]) - zeros) * scales).T.contiguous()

    def write(self, values: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Quantise values with the scales that the groups have; larger values are clipped. See `Scheme.write`."""
        scales, zeros = self._grid(parts)
        codes = (values.T / torch.where(scales == 0, torch.ones_like(scales), scales) + zeros).round().clamp(0, 15)
        ordered = codes.reshape(len(codes), -1, 8)[..., list(AWQ_ORDER)].flatten(-2)
        return {"weight": pack_words(ordered, 4)}

    def _grid(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point of each entry, float32 (d_in, d_out)."""
        if self.settings.get("bits", 4) != 4 or str(self.settings.get("version", "gemm")).lower() != "gemm":
            raise ValueError(
                f"it is {self.settings.get('bits')} bits, {self.settings.get('version')}, not 4 bits, gemm"
            )
        inputs, scales = len(parts["weight"]), parts["scales"].float()
        groups = torch.arange(inputs) // -(-inputs // len(scales))
        return scales[groups], _awq_codes(parts["zeros"]).float()[groups]


def _inputs(parts: Parts, bits: int) -> int:
    groups = parts.get("groups")
    return parts["weight"].shape[0] * (32 // bits) if groups is None else groups.numel()


def _awq_codes(packed: Tensor) -> Tensor:
    """Return the codes of words of AWQ in the order of the outputs."""
    fields = unpack_words(packed, 4, 8 * packed.shape[-1]).reshape(*packed.shape, 8)
    back = sorted(range(8), key=lambda field: AWQ_ORDER[field])
    ordered: Tensor = fields[..., back].flatten(-2)
    return ordered
