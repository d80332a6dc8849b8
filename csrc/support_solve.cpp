// The update of each row of a sparse weight on its own support, on the CPU.
//
// A = keysᵀ D basis has key_count * basis_size elements ("pairs") for each row. For all rows together it is a matrix
// product of the support, zeros and ones, with the products of the elements of keys and of basis:
//
//                       pairs, a panel of tile_columns of them at a time, which is computed when it is needed
//                      +---------------+
//       columns, depth | left * right  |
//                      +---------------+
//    +-----------------+---------------+
//    | support of a    | sums of all   |   an item: at most item_rows rows, whose sums stay in memory until the last
//    | weight's rows   | pairs         |   column; then each row's system is solved in float64
//    +-----------------+---------------+
#include "support_solve.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace rocr {
namespace {

constexpr std::int64_t item_rows = 128;                      // enough to amortize the products of pairs
constexpr std::int64_t max_sums = std::int64_t{1} << 24;     // floats of an item's sums: 64 MiB
constexpr std::int64_t depth = max_sum_depth;

// Memory of one worker.
struct Scratch {
  float* support;  // (rows of an item, support_stride)
  float* panel;
  float* sums;  // (rows of an item, sums_stride)
};

struct Call {
  const SupportSolve& solve;
  const Simd& simd;
  std::int64_t rows;  // of an item, a multiple of tile_rows
  std::int64_t sums_stride;

  std::int64_t pairs() const { return solve.key_count * solve.basis_size; }
  std::int64_t support_floats() const { return rows * support_stride; }
  std::int64_t panel_floats() const { return depth * simd.tile_columns + line_floats; }
  std::int64_t sum_floats() const { return rows * sums_stride; }

  bool solve_item(std::int64_t item, Scratch scratch) const;
  void sum_products(std::int64_t first_row, std::int64_t count, Scratch scratch) const;
  void fill_support(std::int64_t first_row, std::int64_t count, std::int64_t column, std::int64_t steps,
                    float* support) const;
  bool solve_row(const float* sums, std::int64_t row, std::vector<double>& memory) const;
};

Call plan(const SupportSolve& solve, const Simd& simd, int threads) {
  const std::int64_t pairs = solve.key_count * solve.basis_size;
  const std::int64_t sums_stride = divide_up(pairs, simd.tile_columns) * simd.tile_columns + line_floats;
  const std::int64_t rows =
      std::min({item_rows, max_sums / sums_stride, divide_up(solve.rows, 4 * threads)});
  return {solve, simd, divide_up(std::max<std::int64_t>(rows, 1), simd.tile_rows) * simd.tile_rows, sums_stride};
}

bool Call::solve_item(std::int64_t item, Scratch scratch) const {
  const std::int64_t first_row = item * rows;
  const std::int64_t count = std::min(rows, solve.rows - first_row);
  sum_products(first_row, count, scratch);
  const std::int64_t n = solve.key_count, m = solve.basis_size;
  std::vector<double> memory(n * m + n * n + n);
  bool solved = true;
  for (std::int64_t row = 0; row < count; ++row)
    solved = solve_row(scratch.sums + row * sums_stride, first_row + row, memory) && solved;
  return solved;
}

void Call::sum_products(std::int64_t first_row, std::int64_t count, Scratch scratch) const {
  for (std::int64_t column = 0; column < solve.columns; column += depth) {
    const std::int64_t steps = std::min(depth, solve.columns - column);
    fill_support(first_row, count, column, steps, scratch.support);
    for (std::int64_t pair = 0; pair < pairs(); pair += simd.tile_columns) {
      const std::int64_t panel_pairs = std::min(simd.tile_columns, pairs() - pair);
      simd.multiply_pairs(solve.keys + column * solve.key_count, solve.key_count,
                          solve.basis + column * solve.basis_stride, solve.basis_stride, solve.basis_size, pair,
                          panel_pairs, steps, scratch.panel);
      for (std::int64_t row = 0; row < count; row += simd.tile_rows) {
        simd.multiply_support(panel_pairs, steps, scratch.support + row * support_stride, scratch.panel,
                              scratch.sums + row * sums_stride + pair, sums_stride, column > 0);
      }
    }
  }
}

// Rows beyond the last are zeros.
void Call::fill_support(std::int64_t first_row, std::int64_t count, std::int64_t column, std::int64_t steps,
                        float* support) const {
  const char* source =
      static_cast<const char*>(solve.weight) + (first_row * solve.stride + column) * solve.bytes;
  const std::int64_t row_bytes = solve.stride * solve.bytes, end = column + steps;
  const std::int64_t ahead = std::min(depth, solve.columns - end) * solve.bytes;  // of the next steps
  for (std::int64_t row = 0; row < count; ++row, source += row_bytes) {
    simd.find_support(solve.bytes, source, steps, support + row * support_stride);
    for (std::int64_t byte = 0; byte < ahead; byte += 64) __builtin_prefetch(source + steps * solve.bytes + byte, 0, 2);
  }
  std::fill(support + count * support_stride, support + support_floats(), 0.0f);
}

double dot(const double* left, const double* right, std::int64_t count) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) sum += left[i] * right[i];
  return sum;
}

// Solves one system by its Cholesky factor; false if a pivot is not positive.
bool Call::solve_row(const float* sums, std::int64_t row, std::vector<double>& memory) const {
  const std::int64_t n = solve.key_count, m = solve.basis_size;
  double* products = memory.data();
  double* factor = products + n * m;
  double* solution = factor + n * n;
  std::copy(sums, sums + n * m, products);
  for (std::int64_t i = 0; i < n; ++i) {
    double* own = factor + i * n;
    double goal = solve.residuals[row * n + i];
    for (std::int64_t j = 0; j <= i; ++j) {
      const double* other = factor + j * n;
      const double value = dot(products + i * m, products + j * m, m) - dot(own, other, j);
      if (j < i) {
        own[j] = value / other[j];
        goal -= own[j] * solution[j];
      } else {
        const double pivot = value + solve.ridge;
        if (!(pivot > 0.0)) return false;
        own[i] = std::sqrt(pivot);
        solution[i] = goal / own[i];
      }
    }
  }
  for (std::int64_t i = n - 1; i >= 0; --i) {
    solution[i] /= factor[i * n + i];
    for (std::int64_t j = 0; j < i; ++j) solution[j] -= factor[i * n + j] * solution[i];
  }
  float* target = solve.coefficients + row * m;
  for (std::int64_t b = 0; b < m; ++b) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < n; ++i) sum += products[i * m + b] * solution[i];
    target[b] = static_cast<float>(sum);
  }
  return true;
}

void check(const SupportSolve& solve, int threads) {
  if (threads < 1)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", but must be at least 1.");
  const bool has_sizes = solve.rows >= 0 && solve.columns >= 0 && solve.stride >= solve.columns &&
                         solve.key_count >= 1 && solve.basis_size >= 1 &&
                         solve.basis_stride >= solve.basis_size + line_floats;
  if (has_sizes && (solve.bytes == 1 || solve.bytes == 2 || solve.bytes == 4)) return;
  throw std::invalid_argument(
      "A solve on a support needs sizes of at least 0, a key, a basis, elements of 1, 2 or 4 bytes, a stride >= columns "
      "and a basis stride beyond its size, but got " +
      std::to_string(solve.rows) + " rows, " + std::to_string(solve.columns) + " columns of " +
      std::to_string(solve.bytes) + " bytes, stride " + std::to_string(solve.stride) + ", " +
      std::to_string(solve.key_count) + " keys, a basis of " + std::to_string(solve.basis_size) + " and stride " +
      std::to_string(solve.basis_stride) + ".");
}

}  // namespace

bool solve_on_support(const SupportSolve& solve, int threads, const Simd& simd) {
  check(solve, threads);
  if (solve.rows == 0) return true;
  const std::int64_t pairs = solve.key_count * solve.basis_size;
  threads = useful_threads(threads, solve.rows * solve.columns * (pairs / 4 + 1));
  const Call call = plan(solve, simd, threads);
  const std::int64_t items = divide_up(solve.rows, call.rows);
  threads = static_cast<int>(std::min<std::int64_t>(threads, items));
  const std::int64_t worker_floats =
      divide_up(call.support_floats() + call.panel_floats() + call.sum_floats(), line_floats) * line_floats;
  const Buffer memory(threads * worker_floats);
  std::atomic<bool> solved{true};
  run_phases(threads, 1, items, [&](int worker, std::int64_t, std::int64_t item) {
    float* support = memory.data() + worker * worker_floats;
    float* panel = support + call.support_floats();
    if (!call.solve_item(item, {support, panel, panel + call.panel_floats()})) solved = false;
  });
  return solved;
}

}  // namespace rocr
