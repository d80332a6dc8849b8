// The second moment of keys of 16 bits on the matrix units of a CPU (Intel AMX), which multiply bfloat16
// numbers exactly and add up in float32. A float16 key is the sum of two. Parts and products below 2^-126
// count as zero.
#include "simd.h"

#if defined(__x86_64__) && defined(__linux__) && \
    __has_include(<amxbf16intrin.h>) && __has_include(<amxint8intrin.h>)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "amx_pack.h"
#include "parallel.h"
#include "simd_amx_digits.h"

namespace rocr {

extern const Simd avx512, amx;

namespace {

// A block of 2 × 2 result tiles (0 to 3) is multiplied from two left factors (4, 5) and two right ones (6,
// 7). Each factor is replaced as soon as its last product has begun, so that the next one need not wait for
// it.
ROCR_AMX inline void multiply_then_load_left(const Parts* next, std::int64_t stride) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(4, next, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(5, next + stride, 64);
}

ROCR_AMX inline void multiply_then_load_right(const Parts* next, std::int64_t stride) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(6, next, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(7, next + stride, 64);
}

ROCR_AMX inline void multiply_then_load_both(const Parts* left, const Parts* right, std::int64_t stride) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(4, left, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(6, right, 64);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(7, right + stride, 64);
  _tile_loadd(5, left + stride, 64);
}

// sums (2 × 2 tiles, a row of tiles `square / tile` tiles after the other) += rowsᵀ columns over some steps;
// `stride` is between 16 columns. Products of parts come in an order in which one factor stays where it is.
template <int parts>
ROCR_AMX void multiply(const Parts* rows, const Parts* columns, std::int64_t stride, std::int64_t steps,
                       float* sums, bool fresh, const char** soon) {
  float* low = sums + square * tile;
  constexpr int last = parts - 1;
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + tile * tile, 64);
    _tile_loadd(2, low, 64);
    _tile_loadd(3, low + tile * tile, 64);
  }
  const auto part = [](const Parts* factor, int number) { return factor + number * tile_numbers; };
  _tile_loadd(4, part(rows, last), 64);
  _tile_loadd(5, part(rows, last) + stride, 64);
  _tile_loadd(6, columns, 64);
  _tile_loadd(7, columns + stride, 64);
  for (std::int64_t step = 0; step < steps; step += tile_steps) {
    for (int line = 0; line < 4 * parts; ++line) {
      _mm_prefetch(soon[0], _MM_HINT_T1);
      _mm_prefetch(soon[1], _MM_HINT_T1);
      soon[0] += 64;
      soon[1] += 64;
    }
    if (parts == 2) {
      multiply_then_load_right(part(columns, 1), stride);  // 1 · 0
      multiply_then_load_left(rows, stride);               // 1 · 1
      multiply_then_load_right(columns, stride);           // 0 · 1
    }
    rows += parts * tile_numbers;
    columns += parts * tile_numbers;
    multiply_then_load_both(part(rows, last), columns, stride);  // 0 · 0
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + tile * tile, 64);
  _tile_stored(2, low, 64);
  _tile_stored(3, low + tile * tile, 64);
}

// The products of a packed slice for one square of the total, into sums (square × square).
template <int parts>
ROCR_AMX void multiply_square(const Packed& packed, std::int64_t row, std::int64_t column, float* sums) {
  const std::int64_t end_row = std::min(row + square, packed.columns);
  for (std::int64_t first = 0; first < packed.steps; first += sum_steps(parts)) {
    const std::int64_t steps = std::min(sum_steps(parts), packed.steps - first),
                       stride = tile * steps * parts;
    const char* soon[] = {reinterpret_cast<const char*>(packed.left(row, first + steps)),
                          reinterpret_cast<const char*>(packed.right(column, first + steps))};
    for (std::int64_t i = row; i < end_row; i += pair) {
      for (std::int64_t j = column; j < std::min({column + square, end_row, i + pair}); j += pair) {
        multiply<parts>(packed.left(i, first), packed.right(j, first), stride, steps,
                        sums + (i - row) * square + (j - column) * tile, first == 0, soon);
      }
    }
  }
}

// Adds to the lower triangle what lies in tiles.
ROCR_AMX void add_square(float* total, std::int64_t stride, std::int64_t size, Square where,
                         const float* sums) {
  const std::int64_t end_row = std::min(where.row + square, size);
  for (std::int64_t row = where.row; row < end_row; ++row) {
    float* target = total + row * stride + where.column;
    const float* tiles = sums + (row - where.row) / tile * square * tile + (row - where.row) % tile * tile;
    const std::int64_t count = std::min(square, row + 1 - where.column);
    for (std::int64_t column = 0; column < count; column += tile, tiles += tile * tile) {
      const __mmask16 mask = static_cast<__mmask16>((1u << std::min(tile, count - column)) - 1);
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target + column), _mm512_load_ps(tiles));
      _mm512_mask_storeu_ps(target + column, mask, sum);
    }
  }
}

// Tile registers belong to a thread, and are configured for as long as it needs them.
ROCR_AMX void with_tiles(int parts, const Packed& packed, Square where, float* sums) {
  const TileConfig config;
  _tile_loadconfig(&config);
  if (parts == 2) multiply_square<2>(packed, where.row, where.column, sums);
  if (parts == 1) multiply_square<1>(packed, where.row, where.column, sums);
  _tile_release();
}

bool is_supported() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  if (!multiplies_digits() || !avx512.is_supported() || !__builtin_cpu_supports("avx512bf16")) return false;
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if ((d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

void second_moment(float* total, std::int64_t total_stride, const void* keys, std::int64_t keys_stride,
                   std::int64_t tokens, std::int64_t size, Number number, int threads) {
  if (number == Number::float32) {
    return second_moment_by_digits(total, total_stride, static_cast<const float*>(keys), keys_stride, tokens,
                                   size, threads);
  }
  const int parts = parts_of(number);
  const std::int64_t slices = divide_up(tokens, slice_steps(parts));
  const std::int64_t columns = divide_up(size, pair) * pair;
  const std::int64_t steps = divide_up(std::min(tokens, slice_steps(parts)), tile_steps) * tile_steps;
  const std::vector<Square> work = squares(size, square);
  const std::int64_t squares_count = static_cast<std::int64_t>(work.size()),
                     packings = divide_up(columns, packed_columns);
  const std::int64_t slice_numbers = 2 * columns * steps * parts;
  // Two slices of 16-bit numbers, one packed while the other is used; the last product loads factors beyond
  // the end.
  const Buffer packed(slice_numbers + pair * sum_steps(parts) * parts);
  const Buffer sums(threads * square * square);
  const std::int64_t bytes = bytes_of(number);
  const auto slice = [&](std::int64_t phase) {
    return Packed{reinterpret_cast<Parts*>(packed.data()) + phase % 2 * slice_numbers, columns, steps, parts};
  };
  run_phases(useful_threads(threads, tokens * size * size / 2), slices + 1, squares_count + packings,
             [&](int worker, std::int64_t phase, std::int64_t item) {
               if (item < squares_count) {
                 if (phase == 0) return;
                 float* mine = sums.data() + worker * square * square;
                 with_tiles(parts, slice(phase - 1), work[item], mine);
                 add_square(total, total_stride, size, work[item], mine);
               } else if (phase < slices) {
                 const std::int64_t first = phase * slice_steps(parts),
                                    column = (item - squares_count) * packed_columns;
                 const std::int64_t count = std::min(slice_steps(parts), tokens - first);
                 const char* source = static_cast<const char*>(keys) + (first * keys_stride + column) * bytes;
                 pack(number, source, keys_stride * bytes, count, size - column, slice(phase), column);
               }
             });
}

}  // namespace

const Simd amx = [] {
  Simd with_matrix_units = avx512;
  with_matrix_units.name = "amx";
  with_matrix_units.is_supported = is_supported;
  with_matrix_units.second_moment = second_moment;
  return with_matrix_units;
}();

}  // namespace rocr
#elif defined(__x86_64__)
namespace rocr {

extern const Simd amx;
const Simd amx = {"amx", [] { return false; }};

}  // namespace rocr
#endif
