// Calls the kernels of csrc/ for the CPU on odd sizes with every instruction set that runs here, and checks the results
// against sums in double. `make sanitize` builds it under AddressSanitizer and UndefinedBehaviorSanitizer; operands,
// and in every second case the kernels' own buffers, lie against pages that may not be touched.
#include <sys/wait.h>

#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "../../../csrc/low_rank_update.h"
#include "../../../csrc/support_solve.h"
#include "../../../csrc/parallel.h"
#include "../../../csrc/second_moment.h"
#include "../../../csrc/wide_product.h"
#include "matrix.h"

using rocr::Simd;

namespace {

bool guard_buffers = false;
std::mutex buffers_mutex;
std::map<rocr::Buffer*, std::unique_ptr<Guarded>> buffers;

constexpr DType numbers[] = {DType::float32, DType::bfloat16, DType::float16};
const char* const number_names[] = {"float32", "bfloat16", "float16"};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
  std::_Exit(1);
}

void require(bool is_so, const std::string& what) {
  if (!is_so) fail(what);
}

struct Sizes {
  std::int64_t tokens, size, keys_gap, total_gap;
};

std::string described(const Simd& simd, DType dtype, const std::vector<std::int64_t>& sizes, int threads) {
  std::string text = std::string(simd.name) + " " + number_names[static_cast<int>(dtype)];
  for (std::int64_t size : sizes) text += " " + std::to_string(size);
  return text + ", " + std::to_string(threads) + " threads" + (guard_buffers ? ", guarded buffers" : "");
}

void check_second_moment(const Simd& simd, DType dtype, Sizes sizes, int threads, bool at_end) {
  const std::string what = "second moment, " + described(simd, dtype, {sizes.tokens, sizes.size}, threads);
  Random random(sizes.tokens * 1000 + sizes.size);
  const Matrix keys(dtype, sizes.tokens, sizes.size, sizes.size + sizes.keys_gap, at_end, random);
  const Matrix total(DType::float32, sizes.size, sizes.size, sizes.size + sizes.total_gap, at_end, random);
  const std::vector<double> k = keys.values(), before = total.values();
  rocr::accumulate_second_moment(total.floats(), total.stride, keys.data(), keys.stride, sizes.tokens, sizes.size,
                                 dtype, threads, simd);
  const std::vector<double> after = total.values();
  double error = 0, norm = 0;
  for (std::int64_t row = 0; row < sizes.size; ++row) {
    for (std::int64_t column = 0; column < sizes.size; ++column) {
      const std::size_t place = row * sizes.size + column;
      double exact = before[place];
      for (std::int64_t token = 0; column <= row && token < sizes.tokens; ++token)
        exact += k[token * sizes.size + row] * k[token * sizes.size + column];
      if (column > row) require(after[place] == before[place], what + ": the upper triangle was written");
      error += (after[place] - exact) * (after[place] - exact);
      norm += exact * exact;
    }
  }
  require(std::sqrt(error) <= 1e-6 * std::sqrt(norm), what + ": error " + std::to_string(std::sqrt(error / norm)));
  require(keys.gaps_are_whole() && total.gaps_are_whole(), what + ": numbers between rows were written");
}

void check_grouped_second_moment(const Simd& simd, DType dtype, const std::vector<std::int64_t>& groups, Sizes sizes,
                                 int threads, bool at_end) {
  std::vector<std::int64_t> offsets{0};
  for (std::int64_t tokens : groups) offsets.push_back(offsets.back() + tokens);
  const std::string what = "grouped second moment, " + described(simd, dtype, groups, threads);
  const std::int64_t size = sizes.size, count = static_cast<std::int64_t>(groups.size());
  Random random(offsets.back() * 1000 + size);
  const Matrix keys(dtype, offsets.back(), size, size + sizes.keys_gap, at_end, random);
  const Matrix totals(DType::float32, count * size, size, size + sizes.total_gap, at_end, random);
  const std::vector<double> k = keys.values(), before = totals.values();
  rocr::accumulate_grouped_second_moment(totals.floats(), size * totals.stride, totals.stride, keys.data(), keys.stride,
                                         offsets, size, dtype, threads, simd);
  const std::vector<double> after = totals.values();
  for (std::int64_t group = 0; group < count; ++group) {
    double error = 0, norm = 0;
    for (std::int64_t row = 0; row < size; ++row) {
      for (std::int64_t column = 0; column < size; ++column) {
        const std::size_t place = (group * size + row) * size + column;
        double exact = before[place];
        for (std::int64_t token = offsets[group]; column <= row && token < offsets[group + 1]; ++token)
          exact += k[token * size + row] * k[token * size + column];
        if (column > row) require(after[place] == before[place], what + ": an upper triangle was written");
        error += (after[place] - exact) * (after[place] - exact);
        norm += exact * exact;
      }
    }
    require(std::sqrt(error) <= 1e-6 * std::sqrt(norm), what + ": error " + std::to_string(std::sqrt(error / norm)));
  }
  require(keys.gaps_are_whole() && totals.gaps_are_whole(), what + ": numbers between rows were written");
}

struct Shape {
  std::int64_t rows, columns, rank, gap;
};

struct Operands {
  Matrix weight, left, right;
  std::vector<double> before;

  Operands(DType dtype, Shape shape, bool at_end, Random random)
      : weight(dtype, shape.rows, shape.columns, shape.columns + shape.gap, at_end, random),
        left(DType::float32, shape.rows, shape.rank, shape.rank, at_end, random),
        right(DType::float32, shape.rank, shape.columns, shape.columns, at_end, random),
        before(weight.values()) {}

  rocr::LowRankUpdate update() const {
    return {weight.data(), weight.dtype, weight.rows,   weight.columns,
            weight.stride, left.columns,  left.floats(), right.floats()};
  }

  void check(const std::string& what, double scale, bool stochastic) const {
    const std::vector<double> after = weight.values(), l = left.values(), r = right.values();
    const std::int64_t rank = left.columns;
    for (std::int64_t row = 0; row < weight.rows; ++row) {
      for (std::int64_t column = 0; column < weight.columns; ++column) {
        const std::size_t place = row * weight.columns + column;
        double exact = before[place], size = std::abs(exact);
        for (std::int64_t i = 0; i < rank; ++i) {
          const double product = scale * l[row * rank + i] * r[i * weight.columns + column];
          exact += product;
          size += std::abs(product);
        }
        const double bound = rounding_of(weight.dtype) * std::abs(exact) * (stochastic ? 2 : 1) +
                             static_cast<double>(rank + 2) * 0x1p-24 * size;
        require(std::abs(after[place] - exact) <= 1.001 * bound + 0x1p-24,
                what + ": " + std::to_string(after[place]) + " is not " + std::to_string(exact));
      }
    }
    require(weight.gaps_are_whole(), what + ": numbers between rows were written");
  }
};

void check_low_rank_update(const Simd& simd, DType dtype, const std::vector<Shape>& shapes, int threads, bool at_end,
                           bool stochastic) {
  std::vector<std::unique_ptr<Operands>> operands;
  std::vector<rocr::LowRankUpdate> updates;
  for (const Shape& shape : shapes) {
    operands.push_back(std::make_unique<Operands>(dtype, shape, at_end, Random(shape.rows + 7 * shape.columns)));
    updates.push_back(operands.back()->update());
  }
  rocr::low_rank_update(updates, -0.5f, stochastic, false, 3, threads, simd);
  for (const auto& each : operands) {
    const std::vector<std::int64_t> sizes{each->weight.rows, each->weight.columns, each->left.columns};
    each->check("low-rank update, " + described(simd, dtype, sizes, threads), -0.5, stochastic);
  }
}

// Zeros keep their bits, and the other elements are those of an update without them.
void check_kept_zeros(const Simd& simd, DType dtype, Shape shape, bool stochastic) {
  const Operands dense(dtype, shape, true, Random(5)), kept(dtype, shape, true, Random(5));
  for (const Operands* each : {&dense, &kept})
    for (std::int64_t row = 0; row < shape.rows; ++row)
      for (std::int64_t column = row % 2; column < shape.columns; column += 2)
        std::memset(each->weight.at(row, column), 0, each->weight.width());
  rocr::low_rank_update({dense.update()}, 1, stochastic, false, 3, 2, simd);
  rocr::low_rank_update({kept.update()}, 1, stochastic, true, 3, 2, simd);
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    for (std::int64_t column = 0; column < shape.columns; ++column) {
      const double found = kept.weight.value(row, column);
      require(found == (column % 2 == row % 2 ? 0.0 : dense.weight.value(row, column)),
              described(simd, dtype, {row, column}, 2) + ": a kept zero");
    }
  }
}

// The coefficients solve (A Aᵀ + ridge I) y = r, z = Aᵀ y: then A z + ridge y = r, where y = (r - A z) / ridge.
void check_support_solve(const Simd& simd, DType dtype, Sizes sizes, std::int64_t n, std::int64_t m, int threads,
                         bool at_end) {
  Random random(11);
  const std::int64_t rows = sizes.tokens, columns = sizes.size, basis_stride = m + rocr::line_floats;
  const Matrix weight(dtype, rows, columns, columns + sizes.keys_gap, at_end, random);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t column = row % 3; column < columns; column += 2)
      std::memset(weight.at(row, column), 0, weight.width());
  const Matrix keys(DType::float32, columns, n, n, at_end, random);
  const Matrix basis(DType::float32, columns, basis_stride, basis_stride, at_end, random);
  const Matrix residuals(DType::float32, rows, n, n, at_end, random);
  const Matrix found(DType::float32, rows, m, m, at_end, random);
  const double ridge = static_cast<double>(columns) * columns;
  const bool solved = rocr::solve_on_support(
      {weight.data(), rocr::bytes_of(dtype), rows, columns, weight.stride, keys.floats(), n, basis.floats(), m,
       basis_stride, residuals.floats(), ridge, found.floats()},
      threads, simd);
  const std::string what = "a solve on a support, " + described(simd, dtype, {rows, columns, n, m}, threads);
  require(solved, what);
  for (std::int64_t row = 0; row < rows; ++row) {
    std::vector<double> left(n * m), dual(n), again(m);
    for (std::int64_t a = 0; a < n; ++a)
      for (std::int64_t b = 0; b < m; ++b)
        for (std::int64_t column = 0; column < columns; ++column)
          if (weight.value(row, column) != 0.0) left[a * m + b] += keys.value(column, a) * basis.value(column, b);
    double error = 0, norm = 0;
    for (std::int64_t a = 0; a < n; ++a) {
      dual[a] = residuals.value(row, a);
      for (std::int64_t b = 0; b < m; ++b) dual[a] -= left[a * m + b] * found.value(row, b);
      for (std::int64_t b = 0; b < m; ++b) again[b] += left[a * m + b] * dual[a] / ridge;
    }
    for (std::int64_t b = 0; b < m; ++b) {
      error += (again[b] - found.value(row, b)) * (again[b] - found.value(row, b));
      norm += again[b] * again[b];
    }
    require(std::sqrt(error) <= 1e-4 * std::sqrt(norm), what + ": error " + std::to_string(std::sqrt(error / norm)));
  }
}

struct Product {
  std::int64_t rows, columns, count, gap;
};

void check_wide_product(const Simd& simd, DType dtype, Product sizes, int threads, bool at_end) {
  const auto& [rows, columns, count, gap] = sizes;
  Random random(rows + 31 * columns + count);
  const Matrix weight(dtype, rows, columns, columns + gap, at_end, random);
  const Matrix inputs(dtype, count, columns, columns + gap / 2, at_end, random);
  const Matrix output(dtype, count, rows, rows, at_end, random);
  const std::vector<double> w = weight.values(), x = inputs.values(), before = output.values();
  rocr::wide_product({weight.data(), inputs.data(), output.data(), dtype, rows, columns, count, weight.stride,
                      inputs.stride},
                     threads, simd);
  const std::string what = "a product, " + described(simd, dtype, {rows, columns, count}, threads);
  for (std::int64_t index = 0; index < count; ++index) {
    for (std::int64_t row = 0; row < rows; ++row) {
      double exact = before[index * rows + row], size = std::abs(exact);
      for (std::int64_t column = 0; column < columns; ++column) {
        const double product = w[row * columns + column] * x[index * columns + column];
        exact += product;
        size += std::abs(product);
      }
      const double found = output.value(index, row);
      const double bound = rounding_of(dtype) * std::abs(exact) + static_cast<double>(columns + 2) * 0x1p-24 * size;
      require(std::abs(found - exact) <= 1.001 * bound + 0x1p-24,
              what + ": " + std::to_string(found) + " is not " + std::to_string(exact));
    }
  }
  require(weight.gaps_are_whole() && inputs.gaps_are_whole(), what + ": numbers between rows were written");
}

int check_odd_sizes(const Simd& simd) {
  const Sizes moments[] = {{1, 1, 0, 0},    {1, 16, 0, 3},  {2, 17, 5, 0},   {31, 33, 0, 0},  {33, 31, 1, 1},
                           {63, 123, 7, 0}, {65, 48, 0, 0}, {129, 47, 0, 2}, {257, 65, 3, 0}, {513, 34, 0, 0},
                           {1537, 5, 0, 0}, {1601, 19, 1, 1}, {40, 257, 0, 0}, {0, 5, 0, 0},    {5, 0, 0, 0}};
  const std::vector<std::int64_t> groups[] = {{}, {0, 0}, {1}, {0, 33, 1, 0, 7}, {600, 20, 0, 45, 90, 3}, {1601, 1}};
  const Sizes of_groups[] = {{0, 17, 5, 0}, {0, 33, 0, 0}, {0, 49, 0, 2}};
  const std::vector<Shape> updates[] = {{{1, 1, 1, 0}},
                                        {{3, 5, 2, 0}, {0, 4, 3, 0}, {4, 0, 2, 0}, {4, 4, 0, 1}},
                                        {{8, 48, 1, 0}},
                                        {{9, 49, 3, 5}, {17, 15, 7, 0}},
                                        {{63, 123, 5, 1}},
                                        {{65, 31, 257, 0}, {2, 483, 3, 0}},
                                        {{5, 1000, 300, 3}},
                                        {}};
  // With few inputs, one vector of them, several panels, and more than one chunk.
  const Product products[] = {{1, 1, 1, 0},    {3, 5, 2, 3},   {65, 40, 3, 0},  {64, 257, 4, 1}, {7, 4200, 4, 0},
                              {66, 300, 5, 0}, {9, 33, 8, 5},  {67, 513, 9, 0}, {5, 16, 17, 2},  {130, 40, 49, 0},
                              {3, 30, 193, 0}, {0, 4, 3, 0},   {4, 0, 3, 0},    {4, 4, 0, 1}};
  int cases = 0;
  for (DType dtype : numbers) {
    for (int turn = 0; turn < 4; ++turn) {
      const bool at_end = turn % 2 == 0;
      const int threads = turn < 2 ? 1 : 3;
      guard_buffers = turn % 2 == 0;
      for (const Sizes& sizes : moments) check_second_moment(simd, dtype, sizes, threads, at_end), ++cases;
      for (const std::vector<std::int64_t>& tokens : groups)
        for (const Sizes& sizes : of_groups)
          check_grouped_second_moment(simd, dtype, tokens, sizes, threads, at_end), ++cases;
      for (const std::vector<Shape>& shapes : updates)
        check_low_rank_update(simd, dtype, shapes, threads, at_end, turn > 1), ++cases;
      for (const Product& sizes : products) check_wide_product(simd, dtype, sizes, threads, at_end), ++cases;
      check_kept_zeros(simd, dtype, {9, 49, 3, 5}, turn > 1), ++cases;
      check_support_solve(simd, dtype, {1, 1, 0, 0}, 1, 1, threads, at_end), ++cases;
      check_support_solve(simd, dtype, {19, 300, 3, 0}, 3, 5, threads, at_end), ++cases;
      check_support_solve(simd, dtype, {140, 37, 0, 0}, 9, 17, threads, at_end), ++cases;
    }
  }
  return cases;
}

// Rows so far apart that the last begins beyond 2^31 numbers: sparse memory, of which a few pages exist.
int check_far_rows(const Simd& simd) {
  constexpr std::int64_t far = (std::int64_t{1} << 30) + 7;
  for (DType dtype : numbers) {
    check_second_moment(simd, dtype, {4, 33, far, far / 16}, 2, true);
    check_low_rank_update(simd, dtype, {{4, 50, 3, far}}, 2, true, false);
  }
  check_second_moment(simd, DType::bfloat16, {3, 3, 0, far}, 1, true);
  return 7;
}

int check_threads_at_once(const Simd& simd) {
  constexpr int callers = 8;
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller) {
    threads.emplace_back([&simd, caller] {
      const DType dtype = numbers[caller % 3];
      check_second_moment(simd, dtype, {300 + caller, 90, 0, 0}, 2, true);
      check_grouped_second_moment(simd, dtype, {300 + caller, 20, 0, 40}, {0, 50, 0, 0}, 2, true);
      check_low_rank_update(simd, dtype, {{40, 300 + caller, 4, 0}}, 2, true, false);
      check_wide_product(simd, dtype, {300, 100 + caller, 7, 0}, 2, true);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return callers;
}

// Exit status of a child, which says nothing.
template <class Task>
int status_of(const Task& task) {
  const pid_t child = fork();
  if (child == 0) {
    close(2);
    task();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

void check_fork(const Simd& simd) {
  check_second_moment(simd, DType::float32, {400, 150, 0, 0}, 2, true);
  const int status = status_of([&] {
    check_second_moment(simd, DType::float32, {400, 150, 0, 0}, 2, true);
    check_low_rank_update(simd, DType::bfloat16, {{60, 300, 5, 0}}, 2, true, true);
  });
  require(status == 0, std::string("a forked child's results with ") + simd.name);
}

template <class Call>
void check_refused(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return;
  }
  fail("sizes that cannot be were accepted");
}

void check_refusals(const Simd& simd) {
  float some[16] = {};
  for (const auto& [tokens, size, stride] : {std::array<std::int64_t, 3>{-1, 2, 2}, {2, -1, 2}, {2, 3, 2}})
    check_refused([&, tokens = tokens, size = size, stride = stride] {
      rocr::accumulate_second_moment(some, 4, some, stride, tokens, size, DType::float32, 1, simd);
    });
  const std::vector<std::int64_t> wrong[] = {{}, {-1, 1}, {0, 2, 1}};
  for (const std::vector<std::int64_t>& offsets : wrong)
    check_refused([&] {
      rocr::accumulate_grouped_second_moment(some, 4, 2, some, 2, offsets, 2, DType::float32, 1, simd);
    });
  const rocr::LowRankUpdate update{some, DType::float32, 2, 3, 2, 1, some, some};
  check_refused([&] { rocr::low_rank_update({update}, 1, false, false, 0, 1, simd); });
  check_refused([&] { rocr::low_rank_update({}, 1, false, false, 0, 0, simd); });
  const rocr::SupportSolve solve{some, 4, 1, 2, 2, some, 1, some, 1, 17, some, 1.0, some};
  rocr::SupportSolve narrow = solve, thin = solve, empty = solve;
  narrow.stride = 1, thin.basis_stride = 16, empty.key_count = 0;
  for (const rocr::SupportSolve& each : {narrow, thin, empty})
    check_refused([&] { rocr::solve_on_support(each, 1, simd); });
  check_refused([&] { rocr::solve_on_support(solve, 0, simd); });
  const rocr::WideProduct product{some, some, some, DType::float32, 2, 3, 1, 3, 3};
  rocr::WideProduct overlapping = product, negative = product;
  overlapping.inputs_stride = 2, negative.count = -1;
  for (const rocr::WideProduct& each : {overlapping, negative})
    check_refused([&] { rocr::wide_product(each, 1, simd); });
  check_refused([&] { rocr::wide_product(product, 0, simd); });
  check_refused([] { rocr::find_simd("none"); });
}

// The guards themselves: a kernel that is told of one row too many must not survive it.
void check_guards(const Simd& simd) {
  for (bool at_end : {true, false}) {
    const int status = status_of([&] {
      Random random(1);
      const Matrix keys(DType::float32, 64, 64, 64, at_end, random);
      std::vector<float> total(64 * 64);
      const char* first = keys.data() - (at_end ? 0 : 64 * 4);
      rocr::accumulate_second_moment(total.data(), 64, first, 64, at_end ? 65 : 64, 64, DType::float32, 1, simd);
    });
    require(status != 0, std::string("a read beyond the keys went unnoticed with ") + simd.name);
  }
}

}  // namespace

// The linker puts these in the place of Buffer's constructor and destructor (-Wl,--wrap).
extern "C" {
void __real__ZN4rocr6BufferC1El(rocr::Buffer*, std::int64_t);
void __real__ZN4rocr6BufferD1Ev(rocr::Buffer*);

void __wrap__ZN4rocr6BufferC1El(rocr::Buffer* buffer, std::int64_t count) {
  if (!guard_buffers) return __real__ZN4rocr6BufferC1El(buffer, count);
  auto memory = std::make_unique<Guarded>(count * sizeof(float), true, 64);
  std::memset(memory->data(), 0xff, count * sizeof(float));  // NaNs: what is read before it is written shows
  const char* data = memory->data();
  std::memcpy(static_cast<void*>(buffer), &data, sizeof data);
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  buffers[buffer] = std::move(memory);
}

void __wrap__ZN4rocr6BufferD1Ev(rocr::Buffer* buffer) {
  std::unique_lock<std::mutex> lock(buffers_mutex);
  if (buffers.erase(buffer) > 0) return;
  lock.unlock();
  __real__ZN4rocr6BufferD1Ev(buffer);
}
}

int main() {
  for (const Simd* simd : rocr::supported_simds()) {
    int cases = check_odd_sizes(*simd);
    cases += check_far_rows(*simd);
    guard_buffers = false;
    cases += check_threads_at_once(*simd);
    guard_buffers = true;
    cases += check_threads_at_once(*simd);
    check_fork(*simd);
    check_refusals(*simd);
    check_guards(*simd);
    std::printf("%-7s %4d cases right, within their memory\n", simd->name, cases);
    std::fflush(stdout);
  }
  return 0;
}
