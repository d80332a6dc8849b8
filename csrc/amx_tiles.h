// What both kernels for Intel AMX share: the tile registers, and the squares of a total.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <vector>

// GCC warns about values that its own headers leave uninitialized on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define ROCR_AMX \
  __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace rocr {
namespace {

constexpr std::int64_t tile = 16;  // rows of a tile register, and columns of a result

// The operand of LDTILECFG: sizes of the eight tile registers.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Transposes 16 × 16 32-bit words and stores them as a tile.
ROCR_AMX inline void store_transposed(const __m512i* rows, void* target) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  __m512i* found = static_cast<__m512i*>(target);
  for (int i = 0; i < 8; ++i) {
    _mm512_store_si512(found + i, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
    _mm512_store_si512(found + i + 8, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
  }
}

// First row and first column of a square of the total.
struct Square {
  std::int64_t row, column;
};

// The squares of side `square` that intersect the lower triangle of a total, those below the diagonal first.
inline std::vector<Square> squares(std::int64_t size, std::int64_t square) {
  std::vector<Square> found;
  for (std::int64_t row = 0; row < size; row += square)
    for (std::int64_t column = 0; column < row; column += square) found.push_back({row, column});
  for (std::int64_t row = 0; row < size; row += square) found.push_back({row, row});
  return found;
}

}  // namespace
}  // namespace rocr
