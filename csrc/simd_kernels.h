// The kernels of one instruction set, in the vectors of GCC and Clang. A file simd_<name>.cpp includes this once, after
// it has defined ROCR_TARGET, ROCR_WIDTH (numbers in a vector), ROCR_TILE_ROWS and ROCR_TILE_VECTORS.
// Nothing here may call a template of the standard library: the linker could hand this file's copy to the others.
#include <cstdint>
#include <cstring>

#include "simd.h"

#pragma GCC diagnostic ignored "-Wpsabi"
#define ROCR_INLINE ROCR_TARGET __attribute__((always_inline)) inline

namespace rocr {
namespace {

#include "simd_numbers.h"

constexpr std::int64_t width = ROCR_WIDTH;
constexpr std::int64_t tile_rows = ROCR_TILE_ROWS;
constexpr std::int64_t tile_vectors = ROCR_TILE_VECTORS;
constexpr std::int64_t tile_columns = tile_vectors * width;

constexpr std::int64_t common_divisor(std::int64_t a, std::int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }
constexpr std::int64_t group_columns = tile_rows / common_divisor(tile_rows, tile_columns) * tile_columns;

ROCR_TARGET void multiply(std::int64_t depth, const float* rows, const float* columns, float* tile, std::int64_t stride,
                          bool accumulate) {
  Floats sums[tile_rows][tile_vectors];
#pragma GCC unroll 16
  for (int row = 0; row < tile_rows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < tile_vectors; ++vector) {
      sums[row][vector] = Floats{};
      __builtin_prefetch(tile + row * stride + vector * width, 1);
    }
  }
#pragma GCC unroll 1
  for (std::int64_t step = 0; step < depth; ++step) {
    Floats column[tile_vectors];
    __builtin_prefetch(rows + 16 * tile_rows);
#pragma GCC unroll 4
    for (int vector = 0; vector < tile_vectors; ++vector) {
      column[vector] = *reinterpret_cast<const Floats*>(columns + vector * width);
      __builtin_prefetch(columns + 4 * tile_columns + vector * width);
    }
#pragma GCC unroll 16
    for (int row = 0; row < tile_rows; ++row) {
      const Floats factor = rows[row] - Floats{};  // x - 0 is x: a mere broadcast, where 0 + x would be an addition
#pragma GCC unroll 4
      for (int vector = 0; vector < tile_vectors; ++vector) sums[row][vector] += factor * column[vector];
    }
    rows += tile_rows;
    columns += tile_columns;
  }
#pragma GCC unroll 16
  for (int row = 0; row < tile_rows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < tile_vectors; ++vector) {
      Floats* target = reinterpret_cast<Floats*>(tile + row * stride + vector * width);
      *target = accumulate ? *target + sums[row][vector] : sums[row][vector];
    }
  }
}

template <Number number>
ROCR_INLINE void widen_line(const char* source, std::int64_t count, float* line) {
  constexpr std::int64_t bytes = number == Number::float32 ? 4 : 2;
  std::int64_t column = 0;
  for (; column + width <= count; column += width) {
    *reinterpret_cast<Floats*>(line + column) = widen<number>(source + column * bytes);
  }
  for (; column < group_columns; column += width) {
    char rest[width * bytes] = {};
    if (column < count) std::memcpy(rest, source + column * bytes, (count - column) * bytes);
    *reinterpret_cast<Floats*>(line + column) = widen<number>(rest);
  }
}

template <Number number>
ROCR_TARGET void pack_numbers(const char* source, std::int64_t stride, std::int64_t depth, std::int64_t count,
                              float* rows, float* columns) {
  alignas(64) float line[group_columns];
  for (std::int64_t step = 0; step < depth; ++step, source += stride) {
    widen_line<number>(source, count, line);
    for (std::int64_t panel = 0; panel < group_columns / tile_columns; ++panel) {
      std::memcpy(columns + (panel * depth + step) * tile_columns, line + panel * tile_columns, tile_columns * 4);
    }
    if (!rows) continue;
    for (std::int64_t panel = 0; panel < group_columns / tile_rows; ++panel) {
      std::memcpy(rows + (panel * depth + step) * tile_rows, line + panel * tile_rows, tile_rows * 4);
    }
  }
}

void pack(Number number, const void* source, std::int64_t stride, std::int64_t depth, std::int64_t count, float* rows,
          float* columns) {
  const char* bytes = static_cast<const char*>(source);
  switch (number) {
    case Number::float32: return pack_numbers<Number::float32>(bytes, stride * 4, depth, count, rows, columns);
    case Number::bfloat16: return pack_numbers<Number::bfloat16>(bytes, stride * 2, depth, count, rows, columns);
    case Number::float16: return pack_numbers<Number::float16>(bytes, stride * 2, depth, count, rows, columns);
  }
}

template <Number number, bool stochastic>
ROCR_INLINE void add_vector(char* weight, Floats update, std::uint64_t key, std::int64_t column) {
  const Floats sum = widen<number>(weight) + update;
  if (number == Number::float32) {
    *reinterpret_cast<Floats*>(weight) = sum;
  } else if (stochastic) {
    *reinterpret_cast<Halves*>(weight) = narrow_at_random<number>(sum, random_bits(key, column));
  } else {
    *reinterpret_cast<Halves*>(weight) = narrow_to_nearest<number>(sum);
  }
}

template <Number number, bool stochastic>
ROCR_TARGET void add_numbers(void* weight, const float* update, std::int64_t count, std::uint64_t key,
                             std::int64_t first_column) {
  constexpr std::int64_t bytes = number == Number::float32 ? 4 : 2;
  char* target = static_cast<char*>(weight);
  std::int64_t column = 0;
  for (; column + width <= count; column += width) {
    const Floats addend = *reinterpret_cast<const Floats*>(update + column);
    add_vector<number, stochastic>(target + column * bytes, addend, key, first_column + column);
  }
  if (column == count) return;
  char rest[width * bytes] = {};
  Floats addend = {};
  std::memcpy(rest, target + column * bytes, (count - column) * bytes);
  std::memcpy(&addend, update + column, (count - column) * 4);
  add_vector<number, stochastic>(rest, addend, key, first_column + column);
  std::memcpy(target + column * bytes, rest, (count - column) * bytes);
}

void add(Number number, void* weight, const float* update, std::int64_t count, Rounding rounding,
         std::int64_t first_column) {
  const std::uint64_t key = rounding.key;
  if (number == Number::float32) {
    add_numbers<Number::float32, false>(weight, update, count, key, first_column);
  } else if (number == Number::bfloat16) {
    if (rounding.stochastic) return add_numbers<Number::bfloat16, true>(weight, update, count, key, first_column);
    add_numbers<Number::bfloat16, false>(weight, update, count, key, first_column);
  } else {
    if (rounding.stochastic) return add_numbers<Number::float16, true>(weight, update, count, key, first_column);
    add_numbers<Number::float16, false>(weight, update, count, key, first_column);
  }
}

}  // namespace
}  // namespace rocr
