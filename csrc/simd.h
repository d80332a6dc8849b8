// The interface of an instruction set. The operations call these functions and use no instructions themselves.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace rocr {

class MomentKernel;

enum class DType { float32, bfloat16, float16 };

std::int64_t bytes_of(DType dtype);

struct Rounding {
  bool keep_zeros;    // elements that are zero keep their bits
  bool stochastic;    // false: to nearest, ties to even
  std::uint64_t key;  // of the random bits; differs between the rows of all weights
};

// Products that one register sums before it is added to the rest: the rounding error grows with the length.
constexpr std::int64_t max_sum_depth = 256;

constexpr std::int64_t line_floats = 16;        // of a cache line
constexpr std::int64_t support_stride = max_sum_depth + line_floats;  // a power of two would share cache sets
constexpr std::int64_t few_inputs = 4;         // of multiply_few
constexpr std::int64_t max_tile_floats = 1024;  // of the largest register tile

struct Simd {
  const char* name;
  bool (*is_supported)();

  // A register tile of a product has tile_rows x tile_columns elements; tile_rows divides tile_columns. A
  // panel holds tile_columns columns of a matrix: for each row of the matrix (a step of the product) its
  // tile_columns elements, contiguous. A panel is the right factor of one product, and tile_rows columns of it
  // are the left factor of another.
  std::int64_t tile_rows, tile_columns;
  std::int64_t width;  // floats of a vector

  // Steps for which a panel fits in the caches.
  std::int64_t panel_depth;

  // Computes the first `count` columns of tile = rowsᵀ columns or, if `accumulate`, of tile += rowsᵀ columns.
  // It writes up to a vector beyond them. rows_stride is the distance of two steps of `rows`, tile_stride of
  // two rows of `tile`. Each step prefetches a cache line into L2, beginning at `prefetch`.
  void (*multiply)(std::int64_t count, std::int64_t depth, const float* rows, std::int64_t rows_stride,
                   const float* columns, float* tile, std::int64_t tile_stride, bool accumulate,
                   const float* prefetch);

  // Copies `count` columns of a matrix with `depth` rows, `stride` elements apart, into panels as float32.
  // The last panel is padded with zeros.
  void (*pack)(DType dtype, const void* source, std::int64_t stride, std::int64_t depth, std::int64_t count,
               float* panels);

  // weight += update, rounded once. Stochastic rounding draws bits by key and column, from first_column on.
  void (*add)(DType dtype, void* weight, const float* update, std::int64_t count, Rounding rounding,
              std::int64_t first_column);

  // As multiply, but with consecutive steps of `rows` and rows that are support_stride elements apart.
  void (*multiply_support)(std::int64_t count, std::int64_t depth, const float* rows, const float* columns,
                           float* tile, std::int64_t tile_stride, bool accumulate);

  // As multiply_support, with 2 * tile_rows rows, for at most one vector of columns.
  void (*multiply_one_vector)(std::int64_t count, std::int64_t depth, const float* rows, const float* columns,
                              float* tile, std::int64_t tile_stride, bool accumulate);

  // Adds to sums[input] and sums[input + sums_stride] the products of two rows, row_bytes apart, with each of
  // input_count <= few_inputs vectors, which are inputs_stride elements apart and zeros from `count` to the next
  // multiple of the width.
  void (*multiply_few)(DType dtype, const void* rows, std::int64_t row_bytes, std::int64_t count, const float* inputs,
                       std::int64_t inputs_stride, std::int64_t input_count, float* sums, std::int64_t sums_stride);

  // Writes `count` elements as float32, and up to a vector beyond them.
  void (*widen)(DType dtype, const void* source, std::int64_t count, float* target);

  // Writes 1 where an element of `source` is not zero, and 0 where it is. An element has 1, 2 or 4 bytes; the sign
  // of a floating-point zero does not matter. It writes up to a vector beyond `count`.
  void (*find_support)(std::int64_t bytes, const void* source, std::int64_t count, float* target);

  // Fills a panel with products left[a] * right[b]: `count` pairs (a, b) from the pair number `first` on, with b, below
  // `size`, the faster one. The strides are the distances of two steps. It reads up to a vector beyond `right`, and
  // writes up to a vector beyond the panel.
  void (*multiply_pairs)(const float* left, std::int64_t left_stride, const float* right, std::int64_t right_stride,
                         std::int64_t size, std::int64_t first, std::int64_t count, std::int64_t depth,
                         float* panel);

  // Makes the kernel of second moments of keys of this size and dtype. Null: it is composed of the functions
  // above.
  std::unique_ptr<const MomentKernel> (*moment_kernel)(std::int64_t size, DType dtype);
};

// The compiled instruction sets that this machine can run, the fastest first.
const std::vector<const Simd*>& supported_simds();

// The instruction set of this name, or the fastest if the name is empty. Throws std::invalid_argument for any
// other name.
const Simd& find_simd(const std::string& name);

}  // namespace rocr
