"""Float32 keys as three bfloat16 terms, high (0), middle (1) and low (2), and the products of the terms.

The terms are stored as 3 x term_tokens rows. A sum runs over six products of terms, 00, 01, 10, 11, 02 and 20; the
others are below the precision of float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from rocr_kernels._common import address_table, backend_of, dot, opaque, to_bfloat16
from torch import Tensor

TERM_STEP = 64
"""Rows of a term of float32 keys are a multiple of this, so that no step of a configuration spans two terms."""

LEFT_TERMS = tl.constexpr(0b10_00_01_01_00_00)
"""Term of the left operand in each of the six products, two bits each, the first product in the lowest bits."""

RIGHT_TERMS = tl.constexpr(0b00_10_01_00_01_00)
"""The same for the right operand."""


@triton.jit
def term_offsets(token, term_tokens, PRODUCTS: tl.constexpr):
    """Distances from row `token` to the rows of the left and of the right operand.

    With PRODUCTS = 6, `token` counts through six products of terms of term_tokens rows each.
    """
    if PRODUCTS == 1:
        return token * 0, token * 0
    else:
        product = token // term_tokens
        left_term = (LEFT_TERMS >> (2 * product)) & 3
        right_term = (RIGHT_TERMS >> (2 * product)) & 3
        return (left_term - product) * term_tokens, (right_term - product) * term_tokens


@triton.jit
def add_product(left, right, accumulator, ROUNDED: tl.constexpr, BACKEND: tl.constexpr):
    """Return accumulator + left @ right; ROUNDED: with a sum rounded to nearest, which float32 keys need."""
    if ROUNDED:
        product = dot(left, right, tl.zeros(accumulator.shape, dtype=tl.float32), BACKEND)
        return accumulator + opaque(product, BACKEND)
    else:
        return dot(left, right, accumulator, BACKEND)


@triton.jit
def split_keys(
    table,
    terms,
    tokens,
    term_tokens,
    width,
    key_stride,
    term_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKEND: tl.constexpr,
):
    """Write float32 keys as three bfloat16 terms: for each layer all high, then all middle, then all low terms."""
    layer = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(term_stride, COLUMNS)
    token = (tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    keys = tl.load(table + layer).to(tl.pointer_type(tl.float32))
    value = tl.load(keys + token * key_stride + column, mask=(column < width) & (token < tokens), other=0.0)
    for term in tl.static_range(3):
        rounded = to_bfloat16(value, BACKEND)
        value -= rounded.to(tl.float32)
        target = terms + ((3 * layer + term) * term_tokens + token) * term_stride + column
        tl.store(target, rounded, mask=(column < term_stride) & (token < term_tokens))


def split_into_terms(keys: Sequence[Tensor]) -> list[Tensor]:
    """Split float32 keys into terms, for each layer (3 * tokens, width), bfloat16; both sizes are rounded up."""
    table = address_table([keys])
    tokens, width = keys[0].shape
    term_tokens = -(-tokens // TERM_STEP) * TERM_STEP
    term_width = -(-width // 8) * 8
    terms = keys[0].new_empty((len(keys), 3 * term_tokens, term_width), dtype=torch.bfloat16)
    split_keys[(-(-term_tokens // 64) * -(-term_width // 128), len(keys))](
        table,
        terms,
        tokens,
        term_tokens,
        width,
        keys[0].stride(0),
        term_width,
        TOKENS=64,
        COLUMNS=128,
        BACKEND=backend_of(terms.device),
        num_warps=8,
    )
    return list(terms)
