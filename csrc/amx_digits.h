// Float32 keys as fixed-point integers of three digits, in the tile layout of Intel AMX. Included by
// simd_amx_digits.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "amx_tiles.h"

namespace rocr {
namespace {

using Digit = std::int8_t;

constexpr std::int64_t tile_steps = 64;  // tokens in a tile register
constexpr std::int64_t tile_bytes = tile * tile_steps;
constexpr std::int64_t digits = 3;

// The largest magnitude of a column is scaled to at most this integer, whose digits to the base 256 lie between
// -128 and 127.
constexpr float largest = 0x7f7f7f;

// Lower bound for the largest magnitude of a column, so that its factor is finite.
constexpr float smallest = 0x1p-104f;

// A packed slice of tokens. A panel is 16 columns; for each 64 tokens it has one tile for each digit, the
// highest first. Every tile is stored twice: as the left factor of a product (columns × tokens), and as the
// right one (groups of 4 tokens × columns × tokens of a group). A key equals (d0 + d1 / 256 + d2 / 256²) times
// the scale of its column.
struct Packed {
  Digit* data;
  float* scales;
  std::int64_t columns, steps;

  std::int64_t panel() const { return steps * tile * digits; }
  Digit* left(std::int64_t column) const { return data + column / tile * panel(); }
  Digit* right(std::int64_t column) const { return left(columns + column); }
};

// The digits of a vector of keys, in bytes 2 (the highest) to 0 of each 32-bit word.
ROCR_AMX inline __m512i digits_of(const float* source, __mmask16 mask, __m512 factor) {
  const __m512i halves = _mm512_set1_epi32(0x808080);
  const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, source), factor));
  return _mm512_xor_si512(_mm512_add_epi32(number, halves), halves);
}

// Bytes 0 and 2 of the words of two vectors, interleaved; odd_bytes: bytes 1 and 3.
ROCR_AMX inline __m512i even_bytes(__m512i first, __m512i second) {
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, first, _mm512_slli_epi32(second, 8));
}

ROCR_AMX inline __m512i odd_bytes(__m512i first, __m512i second) {
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi32(first, 8), second);
}

// From the digits of 4 tokens, the words that hold one digit of each token, the highest digit first.
ROCR_AMX inline void gather_digits(const __m512i* tokens, __m512i* words) {
  constexpr __mmask32 second_half = 0xaaaaaaaa;
  const __m512i even = even_bytes(tokens[0], tokens[1]), even_too = even_bytes(tokens[2], tokens[3]);
  const __m512i odd = odd_bytes(tokens[0], tokens[1]), odd_too = odd_bytes(tokens[2], tokens[3]);
  words[0] = _mm512_mask_blend_epi16(second_half, _mm512_srli_epi32(even, 16), even_too);
  words[1] = _mm512_mask_blend_epi16(second_half, odd, _mm512_slli_epi32(odd_too, 16));
  words[2] = _mm512_mask_blend_epi16(second_half, even, _mm512_slli_epi32(even_too, 16));
}

// Packs the columns of `mask` of 64 tokens, or of `tokens` if there are fewer.
ROCR_AMX inline void pack_tiles(const float* source, std::int64_t stride, std::int64_t tokens, __mmask16 mask,
                                __m512 factor, Digit* left, Digit* right) {
  __m512i words[digits][tile];
  for (std::int64_t group = 0; group < tile; ++group) {
    __m512i four[4], gathered[digits];
    for (std::int64_t i = 0; i < 4; ++i, source += stride) {
      four[i] = digits_of(source, 4 * group + i < tokens ? mask : 0, factor);
    }
    gather_digits(four, gathered);
    for (std::int64_t digit = 0; digit < digits; ++digit) {
      words[digit][group] = gathered[digit];
      _mm512_store_si512(right + digit * tile_bytes + group * 64, gathered[digit]);
    }
  }
  for (std::int64_t digit = 0; digit < digits; ++digit)
    store_transposed(words[digit], left + digit * tile_bytes);
}

// The largest magnitudes of `count` columns, as bits of float32: in the order of integers, NaN is the largest.
ROCR_AMX void find_largest(const float* source, std::int64_t stride, std::int64_t tokens, std::int64_t count,
                           __m512i* found) {
  constexpr std::int64_t ahead = 16;
  const __m512i without_sign = _mm512_set1_epi32(0x7fffffff);
  for (std::int64_t panel = 0; panel < (count + tile - 1) / tile; ++panel)
    found[panel] = _mm512_setzero_si512();
  for (std::int64_t token = 0; token < tokens; ++token, source += stride) {
    for (std::int64_t column = 0; column < count; column += tile) {
      const __mmask16 mask = static_cast<__mmask16>((1u << std::min(tile, count - column)) - 1);
      if (token + ahead < tokens) _mm_prefetch(source + ahead * stride + column, _MM_HINT_T0);
      const __m512i bits = _mm512_maskz_loadu_epi32(mask, source + column);
      found[column / tile] = _mm512_max_epu32(found[column / tile], _mm512_and_si512(bits, without_sign));
    }
  }
}

constexpr std::int64_t packed_columns = 8 * tile;  // columns that are packed as one item

constexpr int infinity = 0x7f800000;  // bits of float32

// Packs packed_columns columns of a slice: `count` of them exist, the others become zeros. A column is read twice,
// for its largest magnitude and, from L2, for its digits.
ROCR_AMX void pack(const float* source, std::int64_t stride, std::int64_t tokens, std::int64_t count,
                   const Packed& packed, std::int64_t first_column) {
  const std::int64_t width = std::min(packed_columns, packed.columns - first_column);
  count = std::min(count, width);
  __m512i found[packed_columns / tile];
  __m512 factors[packed_columns / tile];
  find_largest(source, stride, tokens, count, found);
  for (std::int64_t column = 0; column < width; column += tile) {
    const __m512 most = _mm512_max_ps(_mm512_set1_ps(smallest), _mm512_castsi512_ps(found[column / tile]));
    const __mmask16 finite = _mm512_cmplt_epu32_mask(found[column / tile], _mm512_set1_epi32(infinity));
    // The factor is a power of two, so scaling is exact. A quarter of the largest magnitude does not overflow.
    const __m512 quarter = _mm512_mul_ps(most, _mm512_set1_ps(0x1p21f / largest));
    const __m512 exponent = _mm512_sub_ps(_mm512_set1_ps(20), _mm512_getexp_ps(quarter));
    const __m512 one = _mm512_set1_ps(1);
    factors[column / tile] = _mm512_maskz_scalef_ps(finite, one, exponent);
    const __m512 scale = _mm512_scalef_ps(one, _mm512_sub_ps(_mm512_set1_ps(16), exponent));
    const __m512 none = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
    _mm512_storeu_ps(packed.scales + first_column + column, _mm512_mask_mov_ps(none, finite, scale));
  }
  for (std::int64_t step = 0; step < packed.steps; step += tile_steps) {
    for (std::int64_t column = 0; column < width; column += tile) {
      const std::int64_t some = std::max<std::int64_t>(0, std::min(tile, count - column));
      const __mmask16 mask = static_cast<__mmask16>((1u << some) - 1);
      const std::int64_t place = step * tile * digits;
      pack_tiles(source + step * stride + (some > 0 ? column : 0), stride, tokens - step, mask,
                 factors[column / tile], packed.left(first_column + column) + place,
                 packed.right(first_column + column) + place);
    }
  }
}

}  // namespace
}  // namespace rocr
