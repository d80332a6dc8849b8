// Keys of 16 bits in the layout of the matrix units of Intel AMX, as bfloat16 numbers: one of that dtype is
// one, one of float16 the sum of two. Included by simd_amx.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "amx_tiles.h"
#include "simd.h"

namespace rocr {
namespace {

using Parts = std::uint16_t;  // the bits of a bfloat16

constexpr std::int64_t tile_steps = 32;  // tokens in a tile register
constexpr std::int64_t tile_numbers = tile * tile_steps;
constexpr std::int64_t pair = 2 * tile;            // columns of two tiles, the side of a block of registers
constexpr std::int64_t square = 8 * pair;          // side of the part of the total that is one item of work
constexpr std::int64_t packed_columns = 4 * pair;  // that are packed as one item of work

// Tokens that a register adds up: few enough to lose nothing, and two panels of them fit the first cache.
constexpr std::int64_t sum_steps(int parts) { return parts == 1 ? 256 : 128; }

// Tokens that are packed at once: the memory for them is the same for every dtype.
constexpr std::int64_t slice_steps(int parts) { return 1536 / parts; }

// A packed slice: for each `sum_steps(parts)` tokens, each 16 columns, each 32 tokens and each part a tile,
// as the left factor of a product (columns × tokens) and as the right one (pairs of tokens × columns).
struct Packed {
  Parts* data;
  std::int64_t columns, steps;
  int parts;

  std::int64_t side() const { return columns * steps * parts; }
  std::int64_t at(std::int64_t column, std::int64_t step) const {
    const std::int64_t first = step / sum_steps(parts) * sum_steps(parts);
    return (first * columns + column * std::min(sum_steps(parts), steps - first) + (step - first) * tile) *
           parts;
  }
  Parts* left(std::int64_t column, std::int64_t step) const { return data + at(column, step); }
  Parts* right(std::int64_t column, std::int64_t step) const { return data + side() + at(column, step); }
};

int parts_of(Number number) { return number == Number::float16 ? 2 : 1; }

template <Number number>
ROCR_AMX inline __m512 load(const char* source, __mmask16 mask) {
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, source);
  if (number == Number::float16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The nearest bfloat16 of every number of two vectors, in pairs.
ROCR_AMX inline __m512i nearest_pairs(__m512 first, __m512 second) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// Packs 16 columns of 32 tokens.
template <Number number, int parts>
ROCR_AMX inline void pack_tile(const char* source, std::int64_t stride, std::int64_t tokens,
                               std::int64_t count, Parts* left, Parts* right) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  const __m512i second_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512i pairs[parts][tile];
  for (std::int64_t i = 0; i < tile; ++i, source += 2 * stride) {
    __m512 first = load<number>(source, 2 * i < tokens ? mask : 0);
    __m512 second = load<number>(source + stride, 2 * i + 1 < tokens ? mask : 0);
    for (int part = 0; part < parts; ++part) {
      pairs[part][i] = nearest_pairs(first, second);
      first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(pairs[part][i], 16)));
      second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(pairs[part][i], second_half)));
      _mm512_store_si512(right + part * tile_numbers + i * tile_steps, pairs[part][i]);
    }
  }
  for (int part = 0; part < parts; ++part) store_transposed(pairs[part], left + part * tile_numbers);
}

// Packs `count` columns of a slice, beside each other in the source, so that its rows are read in long
// pieces.
template <Number number, int parts>
ROCR_AMX void pack_columns(const char* source, std::int64_t stride, std::int64_t tokens, std::int64_t count,
                           const Packed& packed, std::int64_t column) {
  constexpr std::int64_t bytes = 2;
  const std::int64_t end = std::min(column + packed_columns, packed.columns);
  for (std::int64_t step = 0; step < packed.steps; step += tile_steps) {
    for (std::int64_t c = column; c < end; c += tile) {
      const std::int64_t some = std::max<std::int64_t>(0, std::min(tile, count - (c - column)));
      const char* from = source + step * stride + (some > 0 ? (c - column) * bytes : 0);
      pack_tile<number, parts>(from, stride, tokens - step, some, packed.left(c, step),
                               packed.right(c, step));
    }
  }
}

void pack(Number number, const char* source, std::int64_t stride, std::int64_t tokens, std::int64_t count,
          const Packed& packed, std::int64_t column) {
  if (number == Number::bfloat16) {
    pack_columns<Number::bfloat16, 1>(source, stride, tokens, count, packed, column);
  } else {
    pack_columns<Number::float16, 2>(source, stride, tokens, count, packed, column);
  }
}

}  // namespace
}  // namespace rocr
