"""Rounding of exact values to the dtype of a weight: to nearest even, or stochastically without bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rocr.errors import InputError

ROUNDINGS = ("nearest", "stochastic")
FLOAT64_BIAS = 1023
FLOAT64_MANTISSA_BITS = 52


def check_rounding(rounding: str, seed: int) -> None:
    """Raise InputError unless rounding is one of ROUNDINGS and seed fits in 64 bits."""
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding is {rounding!r}, but must be 'nearest' or 'stochastic'.")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}, but must lie in 0 .. 2**63 - 1.")


def round_into(weight: Tensor, exact: Tensor, rounding: str, generator: torch.Generator | None) -> None:
    """Write exact (float32 or float64) into weight, in place, with one rounding to the weight's dtype.

    A float32 weight is always rounded to nearest: its last bit is far below any update worth making.
    """
    if rounding == "stochastic" and weight.dtype != torch.float32:
        exact = _stochastic_neighbour(exact.float(), weight.dtype, generator)
    weight.copy_(exact)


def _stochastic_neighbour(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Round each float32 to one of its two neighbours in dtype, with the expectation of the float32.

    floor(x / q + u) q has the expectation x for u uniform in [0, 1) and q the spacing of dtype at x;
    in float64 all of it is exact.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact)[1].clamp(min=math.frexp(info.smallest_normal)[1]) - 1
    spacing = ((exponent.long() + FLOAT64_BIAS) << FLOAT64_MANTISSA_BITS).view(torch.float64) * info.eps
    draws = torch.rand(exact.shape, generator=generator, device=exact.device)
    neighbour = ((exact.double() / spacing + draws).floor() * spacing).float()
    return torch.where(exact.isfinite(), neighbour, exact)
