"""Arithmetic on float32 inside kernels: bfloat16 parts and their products, and rounding up or down at random."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_bfloat16(value, INTERPRETED: tl.constexpr):
    """Round float32 to bfloat16, ties to even; the interpreter's own conversion truncates."""
    if INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(tl.bfloat16)


@triton.jit
def dot(left, right, accumulator, INTERPRETED: tl.constexpr):
    """Return accumulator + left @ right in float32; the interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(left, right, accumulator)


@triton.jit
def apart(value, INTERPRETED: tl.constexpr):
    """The value itself, in a way that the compiler cannot see through.

    It turns accumulator + dot(left, right, 0) into dot(left, right, accumulator), whose sum tensor cores truncate.
    """
    if INTERPRETED:
        return value
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def add_product(left, right, accumulator, ROUNDED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return accumulator + left @ right; ROUNDED: the two are added with rounding to nearest, for float32 operands."""
    if ROUNDED:
        product = dot(left, right, tl.zeros(accumulator.shape, dtype=tl.float32), INTERPRETED)
        return accumulator + apart(product, INTERPRETED)
    else:
        return dot(left, right, accumulator, INTERPRETED)


@triton.jit
def in_parts(value, PARTS: tl.constexpr, INTERPRETED: tl.constexpr):
    """High, middle and low bfloat16 part of float32; two parts keep 16 of its bits, three keep all 24."""
    high = to_bfloat16(value, INTERPRETED)
    value -= high.to(tl.float32)
    middle = to_bfloat16(value, INTERPRETED)
    if PARTS == 3:
        return high, middle, to_bfloat16(value - middle.to(tl.float32), INTERPRETED)
    else:
        return high, middle, middle


@triton.jit
def dot_of_parts(
    left_high,
    left_middle,
    left_low,
    right_high,
    right_middle,
    right_low,
    accumulator,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return accumulator + left @ right of two operands in parts: three products or six, the small ones first."""
    if PARTS == 3:
        accumulator = dot(left_high, right_low, accumulator, INTERPRETED)
        accumulator = dot(left_low, right_high, accumulator, INTERPRETED)
        accumulator = dot(left_middle, right_middle, accumulator, INTERPRETED)
    accumulator = dot(left_high, right_middle, accumulator, INTERPRETED)
    accumulator = dot(left_middle, right_high, accumulator, INTERPRETED)
    return dot(left_high, right_high, accumulator, INTERPRETED)


@triton.jit
def random_bits(seed, first, second, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """16 random bits for each element of a tile, as uint32.

    One draw of Philox serves eight elements; first is (ROWS, COLUMNS // 8), the number of the eight, second of the
    matrix: the bits depend on an element's place alone, not on how tiles are cut.
    """
    zero = first * 0
    word0, word1, word2, word3 = tl.philox(seed, first, zero + second, zero, zero)
    words = tl.join(tl.join(word0, word1), tl.join(word2, word3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLUMNS))


@triton.jit
def round_at_random(value, bits, TYPE: tl.constexpr):
    """Round float32 to bfloat16 or float16, up or down with the odds that keep the expectation; 16 bits decide."""
    pattern = value.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == TYPE:
        rounded = ((pattern + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((pattern + (bits >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2**-14 float16 has a fixed spacing of 2**-24.
        scaled = value * 16777216.0
        floor = tl.floor(scaled)
        fixed = (floor + tl.where((scaled - floor) * 65536.0 > bits.to(tl.float32), 1.0, 0.0)) * 5.9604644775390625e-8
        rounded = tl.where(tl.abs(value) < 6.103515625e-5, fixed, rounded)
    return tl.where(tl.abs(value) < float("inf"), rounded, value)
