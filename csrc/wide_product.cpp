// Products of 16-bit matrices in float32 on the CPU. An element of the weight is read from memory once.
//
//                       inputs, in panels of tile_columns
//                      +---------+---------+
//       depth columns  | panel   | panel   |   widened, transposed and packed once for all items
//                      +---------+---------+
//    +-----------------+---------+---------+
//    | tile_rows       | sums of an item,  |   a tile of the weight is widened into L1 and multiplied with all panels;
//    | tile_rows       | kept until the    |   the sums of an item are rounded after the last column
//    | (weight)        | last column       |
//    +-----------------+---------+---------+
//
// Few inputs are bound by reading the weight: two of its rows at a time are widened in registers and multiplied with
// the inputs as they lie.
#include "wide_product.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace rocr {
namespace {

constexpr std::int64_t item_rows = 64;   // enough to amortize a panel, few enough for every thread to get some
constexpr std::int64_t max_chunk = 192;  // inputs whose panels of `depth` columns fit in L2
constexpr std::int64_t depth = max_sum_depth;
constexpr std::int64_t reads_as_products = 8;

struct Call {
  const WideProduct& product;
  const Simd& simd;
  std::int64_t first, count;  // the inputs of this chunk
  std::int64_t bytes;         // of an element

  bool has_few() const { return count <= few_inputs; }
  // The sums of one vector of inputs are too few to hide the latency of an addition: a tile then has twice the rows.
  bool has_one_vector() const { return count <= simd.width; }
  std::int64_t tile_rows() const { return has_one_vector() ? 2 * simd.tile_rows : simd.tile_rows; }
  std::int64_t blocks() const { return divide_up(product.columns, depth); }
  std::int64_t padded() const { return divide_up(count, simd.tile_columns) * simd.tile_columns; }
  std::int64_t sums_stride() const { return padded() + line_floats; }  // a power of two would share cache sets
  std::int64_t inputs_stride() const { return divide_up(product.columns, line_floats) * line_floats + line_floats; }
  std::int64_t input_floats() const {
    return has_few() ? few_inputs * inputs_stride() : blocks() * depth * padded() + line_floats;
  }
  std::int64_t tile_floats() const { return tile_rows() * support_stride; }
  std::int64_t worker_floats() const {
    return divide_up(tile_floats() + item_rows * sums_stride(), line_floats) * line_floats;
  }

  const char* weight(std::int64_t row, std::int64_t column) const {
    return static_cast<const char*>(product.weight) + (row * product.weight_stride + column) * bytes;
  }
  const char* input(std::int64_t index, std::int64_t column) const {
    return static_cast<const char*>(product.inputs) + ((first + index) * product.inputs_stride + column) * bytes;
  }

  void widen_inputs(float* inputs) const;
  void pack(std::int64_t block, float* panels) const;
  void multiply_item(std::int64_t item, const float* inputs, float* memory) const;
  void sum_few(std::int64_t first_row, std::int64_t rows, const float* inputs, float* sums) const;
  void sum_panels(std::int64_t first_row, std::int64_t rows, const float* panels, float* tile, float* sums) const;
  void widen_tile(std::int64_t row, std::int64_t column, std::int64_t steps, float* tile) const;
  void write(std::int64_t first_row, std::int64_t rows, const float* sums) const;
};

// Zeros follow the last column, up to a whole vector.
void Call::widen_inputs(float* inputs) const {
  for (std::int64_t index = 0; index < count; ++index, inputs += inputs_stride()) {
    simd.widen(product.dtype, input(index, 0), product.columns, inputs);
    std::fill(inputs + product.columns, inputs + inputs_stride(), 0.0f);
  }
}

void Call::pack(std::int64_t block, float* panels) const {
  const std::int64_t column = block * depth, steps = std::min(depth, product.columns - column);
  float values[support_stride] = {};
  panels += column * padded();
  for (std::int64_t index = 0; index < padded(); ++index) {
    if (index < count) {
      simd.widen(product.dtype, input(index, column), steps, values);
    } else {
      std::fill(values, values + steps, 0.0f);
    }
    float* target = panels + index / simd.tile_columns * simd.tile_columns * steps + index % simd.tile_columns;
    for (std::int64_t step = 0; step < steps; ++step) target[step * simd.tile_columns] = values[step];
  }
}

// Rows beyond the last keep what the memory held: their sums are not used. The next tile is prefetched.
void Call::widen_tile(std::int64_t row, std::int64_t column, std::int64_t steps, float* tile) const {
  for (std::int64_t end = std::min(row + tile_rows(), product.rows); row < end; ++row, tile += support_stride) {
    const char* ahead = weight(std::min(row + tile_rows(), product.rows - 1), column);
    for (std::int64_t byte = 0; byte < steps * bytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
    simd.widen(product.dtype, weight(row, column), steps, tile);
  }
}

void Call::multiply_item(std::int64_t item, const float* inputs, float* memory) const {
  const std::int64_t first_row = item * item_rows, rows = std::min(item_rows, product.rows - first_row);
  float* sums = memory + tile_floats();
  if (has_few()) {
    sum_few(first_row, rows, inputs, sums);
  } else {
    sum_panels(first_row, rows, inputs, memory, sums);
  }
  write(first_row, rows, sums);
}

// A last row without another is its own second row, whose sums are not used.
void Call::sum_few(std::int64_t first_row, std::int64_t rows, const float* inputs, float* sums) const {
  const std::int64_t steps = depth * simd.width;  // each lane of a vector adds `depth` products
  std::fill(sums, sums + item_rows * sums_stride(), 0.0f);
  for (std::int64_t row = 0; row < rows; row += 2) {
    const std::int64_t row_bytes = row + 1 < rows ? product.weight_stride * bytes : 0;
    for (std::int64_t column = 0; column < product.columns; column += steps) {
      simd.multiply_few(product.dtype, weight(first_row + row, column), row_bytes,
                        std::min(steps, product.columns - column), inputs + column, inputs_stride(), count,
                        sums + row * sums_stride(), sums_stride());
    }
  }
}

void Call::sum_panels(std::int64_t first_row, std::int64_t rows, const float* panels, float* tile, float* sums) const {
  const auto multiply = has_one_vector() ? simd.multiply_one_vector : simd.multiply_support;
  for (std::int64_t column = 0; column < product.columns; column += depth) {
    const std::int64_t steps = std::min(depth, product.columns - column);
    for (std::int64_t row = 0; row < rows; row += tile_rows()) {
      widen_tile(first_row + row, column, steps, tile);
      for (std::int64_t panel = 0; panel < count; panel += simd.tile_columns) {
        multiply(count - panel, steps, tile, panels + column * padded() + panel * steps,
                 sums + row * sums_stride() + panel, sums_stride(), column > 0);
      }
    }
  }
}

void Call::write(std::int64_t first_row, std::int64_t rows, const float* sums) const {
  float of_input[item_rows];
  const std::int64_t stride = sums_stride();
  for (std::int64_t index = 0; index < count; ++index) {
    for (std::int64_t row = 0; row < rows; ++row) of_input[row] = sums[row * stride + index];
    char* target = static_cast<char*>(product.output) + ((first + index) * product.rows + first_row) * bytes;
    simd.add(product.dtype, target, of_input, rows, Rounding{false, false, 0}, 0);
  }
}

void check(const WideProduct& product, int threads) {
  if (threads < 1)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", but must be at least 1.");
  const bool has_sizes = product.rows >= 0 && product.columns >= 0 && product.count >= 0;
  if (has_sizes && std::min(product.weight_stride, product.inputs_stride) >= product.columns) return;
  throw std::invalid_argument("A product needs sizes >= 0 and strides >= columns, but got " +
                              std::to_string(product.rows) + " rows, " + std::to_string(product.columns) +
                              " columns, " + std::to_string(product.count) + " inputs and strides " +
                              std::to_string(product.weight_stride) + " and " +
                              std::to_string(product.inputs_stride) + ".");
}

void multiply_chunk(const Call& call, int threads) {
  const Buffer inputs(call.input_floats()), memory(threads * call.worker_floats());
  std::fill(memory.data(), memory.data() + threads * call.worker_floats(), 0.0f);
  if (call.has_few()) {
    call.widen_inputs(inputs.data());
  } else {
    run_on_threads_of_torch(useful_threads(threads, call.product.columns * call.count), call.blocks(),
                            [&](int, std::int64_t block) { call.pack(block, inputs.data()); });
  }
  run_on_threads_of_torch(threads, divide_up(call.product.rows, item_rows), [&](int worker, std::int64_t item) {
    call.multiply_item(item, inputs.data(), memory.data() + worker * call.worker_floats());
  });
}

}  // namespace

void wide_product(const WideProduct& product, int threads, const Simd& simd) {
  check(product, threads);
  if (product.rows == 0 || product.columns == 0) return;
  // Reading an element of the weight takes as long as some multiplications.
  threads = useful_threads(threads, product.rows * product.columns * (product.count + reads_as_products));
  const std::int64_t bytes = bytes_of(product.dtype);
  for (std::int64_t first = 0; first < product.count; first += max_chunk)
    multiply_chunk({product, simd, first, std::min(max_chunk, product.count - first), bytes}, threads);
}

}  // namespace rocr
