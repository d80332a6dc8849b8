// 16-bit keys as bf16 splits in the tile layout of Intel AMX: a bfloat16 key is one term, a float16 key the sum
// of two. `splits` is the number of terms. Included by simd_amx.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "amx_tiles.h"
#include "simd.h"

namespace rocr {
namespace {

using Bfloat16Bits = std::uint16_t;

constexpr std::int64_t tile_steps = 32;  // tokens in a tile register
constexpr std::int64_t tile_elements = tile * tile_steps;
constexpr std::int64_t pair = 2 * tile;            // columns of two tiles; side of a block of 2 × 2 result tiles
constexpr std::int64_t square = 8 * pair;          // side of the part of the total that is one item
constexpr std::int64_t packed_columns = 4 * pair;  // columns that are packed as one item

// Tokens that a tile register sums: few enough to keep the precision of float32, and two panels fit in L1.
constexpr std::int64_t sum_steps(int splits) { return splits == 1 ? 256 : 128; }

// Tokens of a slice, which is packed at once; its memory is the same for every dtype.
constexpr std::int64_t slice_steps(int splits) { return 1536 / splits; }

// A packed slice. Nested from the outside in: sum_steps(splits) tokens, 16 columns, 32 tokens, term, and for
// these a tile. Every tile is stored twice: as the left factor of a product (columns × tokens) and as the right
// one (pairs of tokens × columns).
struct Packed {
  Bfloat16Bits* data;
  std::int64_t columns, steps;
  int splits;

  std::int64_t side() const { return columns * steps * splits; }
  std::int64_t at(std::int64_t column, std::int64_t step) const {
    const std::int64_t first = step / sum_steps(splits) * sum_steps(splits);
    return (first * columns + column * std::min(sum_steps(splits), steps - first) + (step - first) * tile) *
           splits;
  }
  Bfloat16Bits* left(std::int64_t column, std::int64_t step) const { return data + at(column, step); }
  Bfloat16Bits* right(std::int64_t column, std::int64_t step) const { return data + side() + at(column, step); }
};

int bf16_splits_of(DType dtype) { return dtype == DType::float16 ? 2 : 1; }

template <DType dtype>
ROCR_AMX inline __m512 load(const char* source, __mmask16 mask) {
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, source);
  if (dtype == DType::float16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The nearest bfloat16 of each float of two vectors, interleaved in pairs (first, second).
ROCR_AMX inline __m512i nearest_pairs(__m512 first, __m512 second) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// Packs 16 columns of 32 tokens.
template <DType dtype, int splits>
ROCR_AMX inline void pack_tile(const char* source, std::int64_t stride, std::int64_t tokens,
                               std::int64_t count, Bfloat16Bits* left, Bfloat16Bits* right) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  const __m512i second_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512i pairs[splits][tile];
  for (std::int64_t i = 0; i < tile; ++i, source += 2 * stride) {
    __m512 first = load<dtype>(source, 2 * i < tokens ? mask : 0);
    __m512 second = load<dtype>(source + stride, 2 * i + 1 < tokens ? mask : 0);
    for (int term = 0; term < splits; ++term) {
      pairs[term][i] = nearest_pairs(first, second);
      first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(pairs[term][i], 16)));
      second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(pairs[term][i], second_half)));
      _mm512_store_si512(right + term * tile_elements + i * tile_steps, pairs[term][i]);
    }
  }
  for (int term = 0; term < splits; ++term) store_transposed(pairs[term], left + term * tile_elements);
}

// Packs `count` neighbouring columns of a slice, so that long contiguous parts of its rows are read.
template <DType dtype, int splits>
ROCR_AMX void pack_columns(const char* source, std::int64_t stride, std::int64_t tokens, std::int64_t count,
                           const Packed& packed, std::int64_t column) {
  constexpr std::int64_t bytes = 2;
  const std::int64_t end = std::min(column + packed_columns, packed.columns);
  for (std::int64_t step = 0; step < packed.steps; step += tile_steps) {
    for (std::int64_t c = column; c < end; c += tile) {
      const std::int64_t some = std::max<std::int64_t>(0, std::min(tile, count - (c - column)));
      const char* from = source + step * stride + (some > 0 ? (c - column) * bytes : 0);
      pack_tile<dtype, splits>(from, stride, tokens - step, some, packed.left(c, step),
                               packed.right(c, step));
    }
  }
}

void pack(DType dtype, const char* source, std::int64_t stride, std::int64_t tokens, std::int64_t count,
          const Packed& packed, std::int64_t column) {
  if (dtype == DType::bfloat16) {
    pack_columns<DType::bfloat16, 1>(source, stride, tokens, count, packed, column);
  } else {
    pack_columns<DType::float16, 2>(source, stride, tokens, count, packed, column);
  }
}

}  // namespace
}  // namespace rocr
