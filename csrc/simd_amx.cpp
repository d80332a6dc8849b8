// The second moment of 16-bit keys on Intel AMX, whose tile products multiply bfloat16 exactly and sum in
// float32. A float16 key is the sum of two bfloat16 terms. Terms and products below 2^-126 are flushed to zero.
#include "simd.h"

#if defined(__x86_64__) && defined(__linux__) && \
    __has_include(<amxbf16intrin.h>) && __has_include(<amxint8intrin.h>)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "amx_pack.h"
#include "moment_kernel.h"
#include "parallel.h"
#include "simd_amx_digits.h"

namespace rocr {

extern const Simd avx512, amx;

namespace {

// Registers 0 to 3 are a block of 2 × 2 result tiles, 4 and 5 two left factors, 6 and 7 two right factors. A
// factor is replaced right after its last product was issued, so that loads overlap with products.
ROCR_AMX inline void multiply_then_load_left(const Bfloat16Bits* next, std::int64_t stride) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(4, next, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(5, next + stride, 64);
}

ROCR_AMX inline void multiply_then_load_right(const Bfloat16Bits* next, std::int64_t stride) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(6, next, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(7, next + stride, 64);
}

ROCR_AMX inline void multiply_then_load_both(const Bfloat16Bits* left, const Bfloat16Bits* right, std::int64_t stride) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(4, left, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(6, right, 64);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(7, right + stride, 64);
  _tile_loadd(5, left + stride, 64);
}

// sums (2 × 2 tiles; rows of tiles are `square / tile` tiles apart) += rowsᵀ columns over `steps` tokens.
// `stride` is the distance of 16 columns. Consecutive products of terms keep one factor in its registers.
template <int splits>
ROCR_AMX void multiply(const Bfloat16Bits* rows, const Bfloat16Bits* columns, std::int64_t stride, std::int64_t steps,
                       float* sums, bool fresh, const char** prefetch) {
  float* low = sums + square * tile;
  constexpr int last = splits - 1;
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
  const auto term = [](const Bfloat16Bits* factor, int index) { return factor + index * tile_elements; };
  _tile_loadd(4, term(rows, last), 64);
  _tile_loadd(5, term(rows, last) + stride, 64);
  _tile_loadd(6, columns, 64);
  _tile_loadd(7, columns + stride, 64);
  for (std::int64_t step = 0; step < steps; step += tile_steps) {
    for (int line = 0; line < 4 * splits; ++line) {
      _mm_prefetch(prefetch[0], _MM_HINT_T1);
      _mm_prefetch(prefetch[1], _MM_HINT_T1);
      prefetch[0] += 64;
      prefetch[1] += 64;
    }
    if (splits == 2) {
      multiply_then_load_right(term(columns, 1), stride);  // 1 · 0
      multiply_then_load_left(rows, stride);               // 1 · 1
      multiply_then_load_right(columns, stride);           // 0 · 1
    }
    rows += splits * tile_elements;
    columns += splits * tile_elements;
    multiply_then_load_both(term(rows, last), columns, stride);  // 0 · 0
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + tile * tile, 64);
  _tile_stored(2, low, 64);
  _tile_stored(3, low + tile * tile, 64);
}

// Computes the products of a packed slice for one square of the total into sums (square × square).
template <int splits>
ROCR_AMX void multiply_square(const Packed& packed, std::int64_t row, std::int64_t column, float* sums) {
  const std::int64_t end_row = std::min(row + square, packed.columns);
  for (std::int64_t first = 0; first < packed.steps; first += sum_steps(splits)) {
    const std::int64_t steps = std::min(sum_steps(splits), packed.steps - first),
                       stride = tile * steps * splits;
    const char* prefetch[] = {reinterpret_cast<const char*>(packed.left(row, first + steps)),
                          reinterpret_cast<const char*>(packed.right(column, first + steps))};
    for (std::int64_t i = row; i < end_row; i += pair) {
      for (std::int64_t j = column; j < std::min({column + square, end_row, i + pair}); j += pair) {
        multiply<splits>(packed.left(i, first), packed.right(j, first), stride, steps,
                        sums + (i - row) * square + (j - column) * tile, first == 0, prefetch);
      }
    }
  }
}

// Adds the tiles of a square to the lower triangle of the total.
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

// Tile registers belong to a thread, which configures them for the time it uses them.
ROCR_AMX void with_tiles(int splits, const Packed& packed, Square where, float* sums) {
  const TileConfig config;
  _tile_loadconfig(&config);
  if (splits == 2) multiply_square<2>(packed, where.row, where.column, sums);
  if (splits == 1) multiply_square<1>(packed, where.row, where.column, sums);
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

// The kernel for 16-bit keys: a square of the total is one item.
class AmxKernel : public MomentKernel {
 public:
  AmxKernel(std::int64_t size, DType dtype)
      : size_(size),
        columns_(divide_up(size, pair) * pair),
        dtype_(dtype),
        splits_(bf16_splits_of(dtype)),
        squares_(squares(size, square)) {}

  std::int64_t slices(std::int64_t tokens) const override { return divide_up(tokens, slice_steps(splits_)); }
  std::int64_t packings() const override { return divide_up(columns_, packed_columns); }
  std::int64_t products() const override { return static_cast<std::int64_t>(squares_.size()); }
  std::int64_t worker_floats() const override { return square * square; }

  // Two 16-bit sides fill as many floats as one of them has elements. The last product loads factors beyond the end
  // of its slice.
  std::int64_t packed_floats(std::int64_t tokens) const override {
    const std::int64_t steps = divide_up(std::min(tokens, slice_steps(splits_)), tile_steps) * tile_steps;
    return columns_ * steps * splits_ + pair * sum_steps(splits_) * splits_;
  }

  void pack(const Moment& moment, std::int64_t slice, std::int64_t item, float* packed) const override {
    const std::int64_t first = slice * slice_steps(splits_), column = item * packed_columns, bytes = bytes_of(dtype_);
    const std::int64_t count = std::min(slice_steps(splits_), moment.tokens - first);
    const char* source = moment.keys + (first * moment.keys_stride + column) * bytes;
    rocr::pack(dtype_, source, moment.keys_stride * bytes, count, size_ - column, view(moment, packed), column);
  }

  void multiply(const Moment& moment, std::int64_t, std::int64_t item, const float* packed,
                float* mine) const override {
    with_tiles(splits_, view(moment, const_cast<float*>(packed)), squares_[item], mine);
    add_square(moment.total, moment.total_stride, size_, squares_[item], mine);
  }

 private:
  Packed view(const Moment& moment, float* packed) const {
    const std::int64_t tokens = std::min(moment.tokens, slice_steps(splits_));
    return {reinterpret_cast<Bfloat16Bits*>(packed), columns_, divide_up(tokens, tile_steps) * tile_steps, splits_};
  }

  const std::int64_t size_, columns_;
  const DType dtype_;
  const int splits_;
  const std::vector<Square> squares_;
};

std::unique_ptr<const MomentKernel> moment_kernel(std::int64_t size, DType dtype) {
  if (dtype == DType::float32) return make_digits_kernel(size);
  return std::make_unique<AmxKernel>(size, dtype);
}

}  // namespace

const Simd amx = [] {
  Simd with_matrix_units = avx512;
  with_matrix_units.name = "amx";
  with_matrix_units.is_supported = is_supported;
  with_matrix_units.moment_kernel = moment_kernel;
  return with_matrix_units;
}();

}  // namespace rocr
#elif defined(__x86_64__)
namespace rocr {

extern const Simd amx;
const Simd amx = {"amx", [] { return false; }};

}  // namespace rocr
#endif
