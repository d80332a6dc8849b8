// The second moment of float32 keys on Intel AMX, in fixed-point arithmetic. In a slice of tokens every column
// has a scale, relative to which its largest magnitude has 24 bits: three digits of 8 bits. The products of
// digits are summed exactly; only the product of the two lowest digits is omitted. The error of an entry of the
// total is a few float32 roundings of the product of the norms of its two columns, at any scale.
#include "simd_amx_digits.h"

#if defined(__x86_64__) && defined(__linux__) && \
    __has_include(<amxbf16intrin.h>) && __has_include(<amxint8intrin.h>)
#include <algorithm>
#include <vector>

#include "amx_digits.h"
#include "moment_kernel.h"
#include "parallel.h"

namespace rocr {
namespace {

// Tokens of a slice, which is packed at once: two panels of this length fit in L1, and the sums of products of
// the highest digits stay below 2^24, up to which float32 is exact.
constexpr std::int64_t slice_steps = 512;

constexpr std::int64_t square = 16 * tile;  // side of the part of the total that is one item
constexpr std::int64_t sums = 5;            // of products of digits: one for each place value, but two for the third

// A tile of the total, and the sums of products to add to it.
struct Tile {
  float* total;
  std::int64_t stride, rows;
  bool is_diagonal;
  const float *row_scales, *column_scales;
  const std::int32_t* found;
};

ROCR_AMX inline __m512i sum(const std::int32_t* found, int number) {
  return _mm512_load_si512(found + number * tile * tile);
}

// Adds a row of sums to the total: combines them by place value and multiplies by both scales.
ROCR_AMX inline void add_row(const Tile& to, std::int64_t row) {
  const __m512 base = _mm512_set1_ps(1.0f / 256);
  const std::int32_t* found = to.found + row * tile;
  __m512 value = _mm512_cvtepi32_ps(sum(found, 4));
  value = _mm512_fmadd_ps(value, base, _mm512_cvtepi32_ps(_mm512_add_epi32(sum(found, 2), sum(found, 3))));
  value = _mm512_fmadd_ps(value, base, _mm512_cvtepi32_ps(sum(found, 1)));
  value = _mm512_fmadd_ps(value, base, _mm512_cvtepi32_ps(sum(found, 0)));
  value = _mm512_mul_ps(value, _mm512_set1_ps(to.row_scales[row]));
  float* total = to.total + row * to.stride;
  const __mmask16 mask = static_cast<__mmask16>((1u << (to.is_diagonal ? row + 1 : tile)) - 1);
  const __m512 before = _mm512_maskz_loadu_ps(mask, total);
  _mm512_mask_storeu_ps(total, mask, _mm512_fmadd_ps(value, _mm512_load_ps(to.column_scales), before));
}

// Computes the sums of the products of two panels by place value, in registers 0 to 4; the factors are in
// registers 5 to 7. Meanwhile the vector units add the sums of the previous tile to the total and prefetch the
// rows of this one.
ROCR_AMX void multiply(const Digit* left, const Digit* right, std::int64_t steps, std::int32_t* found,
                       const Tile& before, const Tile& now) {
  const std::int64_t rows_each = (tile * tile_steps + steps - 1) / steps;
  std::int64_t row = 0;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  for (std::int64_t step = 0; step < steps; step += tile_steps) {
    _tile_loadd(5, left, 64);                    // 0
    _tile_loadd(6, right, 64);                   // 0
    _tile_loadd(7, right + tile_bytes, 64);      // 1
    _tile_dpbssd(0, 5, 6);                       // 0 · 0
    _tile_dpbssd(1, 5, 7);                       // 0 · 1
    _tile_loadd(5, left + tile_bytes, 64);       // 1
    _tile_dpbssd(3, 5, 7);                       // 1 · 1
    _tile_dpbssd(1, 5, 6);                       // 1 · 0
    _tile_loadd(5, left + 2 * tile_bytes, 64);   // 2
    _tile_dpbssd(2, 5, 6);                       // 2 · 0
    _tile_dpbssd(4, 5, 7);                       // 2 · 1
    _tile_loadd(6, right + 2 * tile_bytes, 64);  // 2
    _tile_loadd(5, left, 64);                    // 0
    _tile_loadd(7, left + tile_bytes, 64);       // 1
    _tile_dpbssd(2, 5, 6);                       // 0 · 2
    _tile_dpbssd(4, 7, 6);                       // 1 · 2
    left += digits * tile_bytes;
    right += digits * tile_bytes;
    for (const std::int64_t end = std::min(tile, row + rows_each); row < end; ++row) {
      if (row < now.rows)
        _mm_prefetch(reinterpret_cast<const char*>(now.total + row * now.stride), _MM_HINT_T0);
      if (row < before.rows) add_row(before, row);
    }
  }
  _tile_stored(0, found, 64);
  _tile_stored(1, found + tile * tile, 64);
  _tile_stored(2, found + 2 * tile * tile, 64);
  _tile_stored(3, found + 3 * tile * tile, 64);
  _tile_stored(4, found + 4 * tile * tile, 64);
}

// Adds the products of a packed slice to one square of the total. Tile registers belong to a thread, which
// configures them for the time it uses them.
ROCR_AMX void add_square(float* total, std::int64_t stride, std::int64_t size, Square where,
                         const Packed& packed) {
  alignas(64) std::int32_t found[2][sums * tile * tile];
  const TileConfig config;
  _tile_loadconfig(&config);
  const std::int64_t end_row = std::min(where.row + square, size);
  Tile before{};
  for (std::int64_t row = where.row; row < end_row; row += tile) {
    for (std::int64_t column = where.column; column < std::min(where.column + square, row + tile);
         column += tile) {
      std::int32_t* mine = before.found == found[0] ? found[1] : found[0];
      const Tile now{total + row * stride + column,
                     stride,
                     std::min(tile, end_row - row),
                     row == column,
                     packed.scales + row,
                     packed.scales + column,
                     mine};
      multiply(packed.left(row), packed.right(column), packed.steps, mine, before, now);
      before = now;
    }
  }
  _tile_release();
  for (std::int64_t row = 0; row < before.rows; ++row) add_row(before, row);
}

// A square of the total is one item.
class DigitsKernel : public MomentKernel {
 public:
  explicit DigitsKernel(std::int64_t size)
      : size_(size), columns_(divide_up(size, tile) * tile), squares_(squares(size, square)) {}

  std::int64_t slices(std::int64_t tokens) const override { return divide_up(tokens, slice_steps); }
  std::int64_t packings() const override { return divide_up(columns_, packed_columns); }
  std::int64_t products() const override { return static_cast<std::int64_t>(squares_.size()); }
  std::int64_t packed_floats(std::int64_t tokens) const override {
    return digits_floats(tokens) + columns_;  // and a scale for each column
  }

  void pack(const Moment& moment, std::int64_t slice, std::int64_t item, float* packed) const override {
    const std::int64_t first = slice * slice_steps, column = item * packed_columns;
    const float* keys = reinterpret_cast<const float*>(moment.keys) + first * moment.keys_stride + column;
    rocr::pack(keys, moment.keys_stride, std::min(slice_steps, moment.tokens - first), size_ - column,
               view(moment, packed), column);
  }

  void multiply(const Moment& moment, std::int64_t, std::int64_t item, const float* packed, float*) const override {
    add_square(moment.total, moment.total_stride, size_, squares_[item], view(moment, const_cast<float*>(packed)));
  }

 private:
  static std::int64_t steps(std::int64_t tokens) {
    return divide_up(std::min(tokens, slice_steps), tile_steps) * tile_steps;
  }
  std::int64_t digits_floats(std::int64_t tokens) const {
    return 2 * columns_ * steps(tokens) * digits / static_cast<std::int64_t>(sizeof(float));
  }
  Packed view(const Moment& moment, float* packed) const {
    return {reinterpret_cast<Digit*>(packed), packed + digits_floats(moment.tokens), columns_, steps(moment.tokens)};
  }

  const std::int64_t size_, columns_;
  const std::vector<Square> squares_;
};

}  // namespace

bool multiplies_digits() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned amx_int8 = 1u << 25;
  return (d & amx_int8) != 0;
}

std::unique_ptr<const MomentKernel> make_digits_kernel(std::int64_t size) {
  return std::make_unique<DigitsKernel>(size);
}

}  // namespace rocr
#endif
