// The kernels of one instruction set, written with the vector extensions of GCC and Clang. A file
// simd_<name>.cpp includes this once, after it has defined ROCR_TARGET, ROCR_WIDTH (floats of a vector),
// ROCR_TILE_ROWS and ROCR_TILE_VECTORS. Nothing here may call a template of the standard library: the linker
// could use the copy of one instruction set for the others.
#include <cstdint>
#include <cstring>

#include "simd.h"

#pragma GCC diagnostic ignored "-Wpsabi"
#if !defined(ROCR_WIDEN)
#define ROCR_WIDEN(halves) __builtin_convertvector(halves, Bits)
#endif
#if !defined(ROCR_WIDEN_BYTES)
#define ROCR_WIDEN_BYTES(bytes) __builtin_convertvector(bytes, Bits)
#endif
#define ROCR_INLINE ROCR_TARGET __attribute__((always_inline)) inline

namespace rocr {
namespace {

#include "simd_convert.h"

constexpr std::int64_t width = ROCR_WIDTH;
constexpr std::int64_t tile_rows = ROCR_TILE_ROWS;
constexpr std::int64_t tile_vectors = ROCR_TILE_VECTORS;
constexpr std::int64_t tile_columns = tile_vectors * width;

static_assert(tile_columns % tile_rows == 0 && tile_rows * tile_columns <= max_tile_floats);

// Rows of the left factor are row_distance elements apart, its steps rows_stride.
template <int vectors, std::int64_t row_distance = 1, std::int64_t row_count = tile_rows>
ROCR_TARGET void multiply_vectors(std::int64_t depth, const float* rows, std::int64_t rows_stride,
                                  const float* columns, float* tile, std::int64_t tile_stride,
                                  bool accumulate, const float* prefetch) {
  Floats sums[row_count][vectors];
#pragma GCC unroll 16
  for (int row = 0; row < row_count; ++row) {
#pragma GCC unroll 8
    for (int vector = 0; vector < vectors; ++vector) {
      sums[row][vector] = Floats{};
      if (accumulate) __builtin_prefetch(tile + row * tile_stride + vector * width, 1);
    }
  }
#pragma GCC unroll 4
  for (std::int64_t step = 0; step < depth; ++step) {
    Floats column[vectors];
    __builtin_prefetch(rows + 8 * rows_stride);
    __builtin_prefetch(prefetch + step * line_floats, 0, 2);
#pragma GCC unroll 8
    for (int vector = 0; vector < vectors; ++vector) {
      column[vector] = *reinterpret_cast<const Floats*>(columns + vector * width);
    }
#pragma GCC unroll 16
    for (int row = 0; row < row_count; ++row) {
      // x - 0 equals x for all x, so it compiles to a broadcast; 0 + x would be an addition.
      const Floats factor = rows[row * row_distance] - Floats{};
#pragma GCC unroll 8
      for (int vector = 0; vector < vectors; ++vector) sums[row][vector] += factor * column[vector];
    }
    rows += rows_stride;
    columns += tile_columns;
  }
#pragma GCC unroll 16
  for (int row = 0; row < row_count; ++row) {
#pragma GCC unroll 8
    for (int vector = 0; vector < vectors; ++vector) {
      Floats* target = reinterpret_cast<Floats*>(tile + row * tile_stride + vector * width);
      *target = accumulate ? *target + sums[row][vector] : sums[row][vector];
    }
  }
}

template <int vectors>
void multiply_first(std::int64_t count, std::int64_t depth, const float* rows, std::int64_t rows_stride,
                    const float* columns, float* tile, std::int64_t tile_stride, bool accumulate,
                    const float* prefetch) {
  if (count > (vectors - 1) * width) {
    multiply_vectors<vectors>(depth, rows, rows_stride, columns, tile, tile_stride, accumulate, prefetch);
  } else if constexpr (vectors > 1) {
    multiply_first<vectors - 1>(count, depth, rows, rows_stride, columns, tile, tile_stride, accumulate,
                                prefetch);
  }
}

template <int vectors>
void multiply_support_first(std::int64_t count, std::int64_t depth, const float* rows, const float* columns,
                            float* tile, std::int64_t tile_stride, bool accumulate) {
  if (count > (vectors - 1) * width) {
    multiply_vectors<vectors, support_stride>(depth, rows, 1, columns, tile, tile_stride, accumulate, columns);
  } else if constexpr (vectors > 1) {
    multiply_support_first<vectors - 1>(count, depth, rows, columns, tile, tile_stride, accumulate);
  }
}

void multiply_one_vector(std::int64_t, std::int64_t depth, const float* rows, const float* columns, float* tile,
                         std::int64_t tile_stride, bool accumulate) {
  multiply_vectors<1, support_stride, 2 * tile_rows>(depth, rows, 1, columns, tile, tile_stride, accumulate, columns);
}

template <std::int64_t bytes>
ROCR_INLINE Bits magnitude(const char* source) {
  if (bytes == 1) return ROCR_WIDEN_BYTES(*reinterpret_cast<const Bytes*>(source));
  if (bytes == 2) return ROCR_WIDEN(*reinterpret_cast<const Halves*>(source)) & 0x7fff;
  return *reinterpret_cast<const Bits*>(source) & magnitude_bits;
}

template <std::int64_t bytes>
ROCR_TARGET void find_support_of(const char* source, std::int64_t count, float* target) {
  const Bits one = all(0x3f800000);  // 1.0f
  std::int64_t column = 0;
  for (; column + width <= count; column += width) {
    *reinterpret_cast<Bits*>(target + column) = (Bits)(magnitude<bytes>(source + column * bytes) != 0) & one;
  }
  if (column == count) return;
  char rest[width * bytes] = {};
  std::memcpy(rest, source + column * bytes, (count - column) * bytes);
  *reinterpret_cast<Bits*>(target + column) = (Bits)(magnitude<bytes>(rest) != 0) & one;
}

void find_support(std::int64_t bytes, const void* source, std::int64_t count, float* target) {
  const char* elements = static_cast<const char*>(source);
  if (bytes == 1) return find_support_of<1>(elements, count, target);
  if (bytes == 2) return find_support_of<2>(elements, count, target);
  find_support_of<4>(elements, count, target);
}

// Vectors overlap: what one writes beyond its pairs is overwritten by the next.
ROCR_TARGET void multiply_pairs(const float* left, std::int64_t left_stride, const float* right,
                               std::int64_t right_stride, std::int64_t size, std::int64_t first,
                               std::int64_t count, std::int64_t depth, float* panel) {
  const std::int64_t first_left = first / size, first_right = first % size;
  for (std::int64_t step = 0; step < depth; ++step) {
    const float* factor = left + step * left_stride + first_left;
    const float* factors = right + step * right_stride;
    float* target = panel + step * tile_columns;
    std::int64_t from = first_right;
    for (std::int64_t done = 0; done < count; done += size - from, from = 0, ++factor) {
      const Floats wide = *factor - Floats{};
      for (std::int64_t i = from; i < size && done + i - from < count; i += width) {
        *reinterpret_cast<Floats*>(target + done + i - from) = wide * *reinterpret_cast<const Floats*>(factors + i);
      }
    }
  }
}

template <DType dtype>
ROCR_INLINE Floats widen_some(const char* source, std::int64_t count) {
  constexpr std::int64_t bytes = dtype == DType::float32 ? 4 : 2;
  if (count >= width) return widen<dtype>(source);
  char some[width * bytes] = {};
  if (count > 0) std::memcpy(some, source, count * bytes);
  return widen<dtype>(some);
}

ROCR_INLINE float sum_of(Floats values) {
  float lanes[width];
  std::memcpy(lanes, &values, sizeof values);
#pragma GCC unroll 4
  for (int half = width / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <int inputs>
ROCR_INLINE void add_products(Floats one, Floats two, const float* vectors, std::int64_t stride, Floats* first,
                              Floats* second) {
#pragma GCC unroll 4
  for (int input = 0; input < inputs; ++input) {
    const Floats factor = *reinterpret_cast<const Floats*>(vectors + input * stride);
    first[input] += one * factor;
    second[input] += two * factor;
  }
}

template <DType dtype, int inputs>
ROCR_TARGET void multiply_inputs(const char* rows, std::int64_t row_bytes, std::int64_t count, const float* vectors,
                                 std::int64_t stride, float* sums, std::int64_t sums_stride) {
  constexpr std::int64_t bytes = dtype == DType::float32 ? 4 : 2;
  Floats first[inputs] = {}, second[inputs] = {};
  std::int64_t i = 0;
  for (; i + width <= count; i += width) {
    const char* source = rows + i * bytes;
    // The two rows that follow: hardware does not prefetch across the end of a short row.
    __builtin_prefetch(source + 2 * row_bytes, 0, 2);
    __builtin_prefetch(source + 3 * row_bytes, 0, 2);
    add_products<inputs>(widen<dtype>(source), widen<dtype>(source + row_bytes), vectors + i, stride, first, second);
  }
  if (i < count) {
    const char* source = rows + i * bytes;
    add_products<inputs>(widen_some<dtype>(source, count - i), widen_some<dtype>(source + row_bytes, count - i),
                         vectors + i, stride, first, second);
  }
  // Unrolled, so that the sums stay in registers.
#pragma GCC unroll 4
  for (int input = 0; input < inputs; ++input) {
    sums[input] += sum_of(first[input]);
    sums[input + sums_stride] += sum_of(second[input]);
  }
}

template <DType dtype>
void multiply_few_elements(const void* rows, std::int64_t row_bytes, std::int64_t count, const float* inputs,
                           std::int64_t stride, std::int64_t input_count, float* sums, std::int64_t sums_stride) {
  static_assert(few_inputs == 4, "one case for each number of inputs");
  const char* bytes = static_cast<const char*>(rows);
  switch (input_count) {
    case 1:
      return multiply_inputs<dtype, 1>(bytes, row_bytes, count, inputs, stride, sums, sums_stride);
    case 2:
      return multiply_inputs<dtype, 2>(bytes, row_bytes, count, inputs, stride, sums, sums_stride);
    case 3:
      return multiply_inputs<dtype, 3>(bytes, row_bytes, count, inputs, stride, sums, sums_stride);
    case 4:
      return multiply_inputs<dtype, 4>(bytes, row_bytes, count, inputs, stride, sums, sums_stride);
  }
}

void multiply_few(DType dtype, const void* rows, std::int64_t row_bytes, std::int64_t count, const float* inputs,
                  std::int64_t stride, std::int64_t input_count, float* sums, std::int64_t sums_stride) {
  const auto multiply = dtype == DType::float32    ? multiply_few_elements<DType::float32>
                        : dtype == DType::bfloat16 ? multiply_few_elements<DType::bfloat16>
                                                   : multiply_few_elements<DType::float16>;
  multiply(rows, row_bytes, count, inputs, stride, input_count, sums, sums_stride);
}

template <DType dtype>
ROCR_TARGET void widen_elements(const char* source, std::int64_t count, float* target) {
  constexpr std::int64_t bytes = dtype == DType::float32 ? 4 : 2;
  for (std::int64_t i = 0; i < count; i += width)
    *reinterpret_cast<Floats*>(target + i) = widen_some<dtype>(source + i * bytes, count - i);
}

void widen_row(DType dtype, const void* source, std::int64_t count, float* target) {
  const char* bytes = static_cast<const char*>(source);
  switch (dtype) {
    case DType::float32:
      return widen_elements<DType::float32>(bytes, count, target);
    case DType::bfloat16:
      return widen_elements<DType::bfloat16>(bytes, count, target);
    case DType::float16:
      return widen_elements<DType::float16>(bytes, count, target);
  }
}

template <DType dtype>
ROCR_TARGET void pack_elements(const char* source, std::int64_t stride, std::int64_t depth, std::int64_t count,
                              float* panels) {
  constexpr std::int64_t bytes = dtype == DType::float32 ? 4 : 2;
  constexpr std::int64_t steps_ahead = 4;
  const std::int64_t panel_count = (count + tile_columns - 1) / tile_columns;
  for (std::int64_t step = 0; step < depth; ++step, source += stride) {
    if (step + steps_ahead < depth) {
      for (std::int64_t i = 0; i < count * bytes; i += 64)
        __builtin_prefetch(source + steps_ahead * stride + i);
    }
    for (std::int64_t panel = 0; panel < panel_count; ++panel) {
      float* target = panels + (panel * depth + step) * tile_columns;
      for (std::int64_t vector = 0; vector < tile_vectors; ++vector) {
        const std::int64_t column = panel * tile_columns + vector * width;
        *reinterpret_cast<Floats*>(target + vector * width) =
            widen_some<dtype>(source + column * bytes, count - column);
      }
    }
  }
}

void pack(DType dtype, const void* source, std::int64_t stride, std::int64_t depth, std::int64_t count,
          float* panels) {
  const char* bytes = static_cast<const char*>(source);
  switch (dtype) {
    case DType::float32:
      return pack_elements<DType::float32>(bytes, stride * 4, depth, count, panels);
    case DType::bfloat16:
      return pack_elements<DType::bfloat16>(bytes, stride * 2, depth, count, panels);
    case DType::float16:
      return pack_elements<DType::float16>(bytes, stride * 2, depth, count, panels);
  }
}

template <DType dtype, bool stochastic, bool keep_zeros>
ROCR_INLINE void add_vector(char* weight, Floats update, std::uint64_t key, std::int64_t column) {
  Floats sum = widen<dtype>(weight) + update;
  if (dtype == DType::float32) {
    const Bits before = *reinterpret_cast<const Bits*>(weight);
    if (keep_zeros) sum = (Floats)select((before & magnitude_bits) == 0, before, (Bits)sum);
    *reinterpret_cast<Floats*>(weight) = sum;
  } else {
    const Halves before = *reinterpret_cast<const Halves*>(weight);
    const Halves after = stochastic ? narrow_stochastic<dtype>(sum, random_bits(key, column)) : narrow_nearest<dtype>(sum);
    *reinterpret_cast<Halves*>(weight) = keep_zeros ? ((before & 0x7fff) == 0 ? before : after) : after;
  }
}

template <DType dtype, bool stochastic, bool keep_zeros>
ROCR_TARGET void add_elements(void* weight, const float* update, std::int64_t count, std::uint64_t key,
                             std::int64_t first_column) {
  constexpr std::int64_t bytes = dtype == DType::float32 ? 4 : 2;
  char* target = static_cast<char*>(weight);
  std::int64_t column = 0;
#if defined(ROCR_NARROW_TWO)
  for (; dtype == DType::bfloat16 && !stochastic && !keep_zeros && column + 2 * width <= count; column += 2 * width) {
    char* both = target + column * bytes;
    const Floats* addends = reinterpret_cast<const Floats*>(update + column);
    const Floats first = widen<dtype>(both) + addends[0], second = widen<dtype>(both + width * bytes) + addends[1];
    if (store_two_bfloat16(both, first, second)) continue;
    add_vector<dtype, stochastic, keep_zeros>(both, addends[0], key, first_column + column);
    add_vector<dtype, stochastic, keep_zeros>(both + width * bytes, addends[1], key, first_column + column + width);
  }
#endif
  for (; column + width <= count; column += width) {
    const Floats addend = *reinterpret_cast<const Floats*>(update + column);
    add_vector<dtype, stochastic, keep_zeros>(target + column * bytes, addend, key, first_column + column);
  }
  if (column == count) return;
  char rest[width * bytes] = {};
  Floats addend = {};
  std::memcpy(rest, target + column * bytes, (count - column) * bytes);
  std::memcpy(&addend, update + column, (count - column) * 4);
  add_vector<dtype, stochastic, keep_zeros>(rest, addend, key, first_column + column);
  std::memcpy(target + column * bytes, rest, (count - column) * bytes);
}

template <DType dtype>
void add_dtype(void* weight, const float* update, std::int64_t count, Rounding rounding, std::int64_t first_column) {
  const std::uint64_t key = rounding.key;
  if (rounding.stochastic && dtype != DType::float32) {
    if (rounding.keep_zeros) return add_elements<dtype, true, true>(weight, update, count, key, first_column);
    return add_elements<dtype, true, false>(weight, update, count, key, first_column);
  }
  if (rounding.keep_zeros) return add_elements<dtype, false, true>(weight, update, count, key, first_column);
  add_elements<dtype, false, false>(weight, update, count, key, first_column);
}

void add(DType dtype, void* weight, const float* update, std::int64_t count, Rounding rounding,
         std::int64_t first_column) {
  switch (dtype) {
    case DType::float32:
      return add_dtype<DType::float32>(weight, update, count, rounding, first_column);
    case DType::bfloat16:
      return add_dtype<DType::bfloat16>(weight, update, count, rounding, first_column);
    case DType::float16:
      return add_dtype<DType::float16>(weight, update, count, rounding, first_column);
  }
}

}  // namespace
}  // namespace rocr
