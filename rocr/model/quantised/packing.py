"""Small integers and 4-bit floats that several schemes pack into bytes and words."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of a 4-bit float without its sign, which is bit 3. Source: OCP Microscaling Formats (MX) 1.0."""
E8M0_BIAS = 127
"""A byte b of a scale in e8m0 stands for 2^(b - 127). Source: OCP Microscaling Formats (MX) 1.0."""


def e2m1_table() -> Tensor:
    """Return the values of the 16 codes of a 4-bit float, float32."""
    values = torch.tensor(E2M1)
    return torch.cat([values, -values])


def unpack_nibbles(packed: Tensor, high_first: bool = False) -> Tensor:
    """Return two codes for each byte, along the last dimension, as int64."""
    low, high = (packed & 15).long(), (packed >> 4).long()
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).flatten(-2)


def pack_nibbles(codes: Tensor, high_first: bool = False) -> Tensor:
    """Return one byte for two codes of the last dimension; the inverse of `unpack_nibbles`."""
    first, second = codes.reshape(*codes.shape[:-1], -1, 2).unbind(-1)
    packed: Tensor = first << 4 | second if high_first else second << 4 | first
    return packed.to(torch.uint8)


def unpack_words(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the unsigned codes that are packed into int32 words along the last dimension, the lowest bits first.

    Args:
        packed: (..., words) int32.
        bits: Bits of a code, a divisor of 32.
        count: The number of codes; the last word may have more room.

    Raises:
        ValueError: The words have no room for the codes, or codes of this size cross words.
    """
    _check_bits(bits)
    shifts = torch.arange(0, 32, bits)
    codes = (packed.long().unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)
    if not 0 < count <= codes.shape[-1]:
        raise ValueError(f"{packed.shape[-1]} words hold {codes.shape[-1]} codes of {bits} bits, not {count}")
    return codes[..., :count]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return int32 words with codes packed along the last dimension; the inverse of `unpack_words`."""
    _check_bits(bits)
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % per_word))
    words = (padded.reshape(*padded.shape[:-1], -1, per_word) << torch.arange(0, 32, bits)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def powers_of_two(codes: Tensor) -> Tensor:
    """Return the scales that bytes in e8m0 stand for, float32."""
    return (codes.float() - E8M0_BIAS).exp2()


def _check_bits(bits: int) -> None:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"rocr reads integers of 1, 2, 4 and 8 bits, not of {bits}")
