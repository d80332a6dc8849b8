// What an instruction set offers; the operations are written against this table and know no instruction.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rocr {

enum class Number { float32, bfloat16, float16 };

std::int64_t bytes_of(Number number);

struct Rounding {
  bool stochastic;    // or to nearest, ties to even
  std::uint64_t key;  // of the random bits: another for every row of every weight
};

// Products that one register adds up before it is added to the rest: longer sums round more.
constexpr std::int64_t max_sum_depth = 256;

constexpr std::int64_t line_numbers = 16;        // in a cache line
constexpr std::int64_t max_tile_numbers = 1024;  // room for the largest register tile

struct Simd {
  const char* name;
  bool (*is_supported)();

  // A register tile of a product has tile_rows x tile_columns numbers, and tile_rows divides tile_columns. A
  // panel holds tile_columns columns of a matrix: for each of its rows (the steps of a product) the
  // tile_columns numbers of that row, side by side. One panel serves as the columns of a product, tile_rows
  // columns of it as the rows of another.
  std::int64_t tile_rows, tile_columns;

  // Steps for which a panel stays in the caches next to the arithmetic.
  std::int64_t panel_depth;

  // The first `count` columns of tile = rowsᵀ columns, or of tile += rowsᵀ columns; it may write up to a
  // vector more. Strides are distances of two steps of rows, and of two rows of tile. On the way it fetches a
  // cache line per step, beginning at `soon`, into the second cache.
  void (*multiply)(std::int64_t count, std::int64_t depth, const float* rows, std::int64_t rows_stride,
                   const float* columns, float* tile, std::int64_t tile_stride, bool accumulate,
                   const float* soon);

  // Copies `count` columns of a matrix with `depth` rows, `stride` numbers apart, into panels; the last one
  // is filled up with zeros.
  void (*pack)(Number number, const void* source, std::int64_t stride, std::int64_t depth, std::int64_t count,
               float* panels);

  // weight += update, rounded once; first_column tells a row's numbers apart under stochastic rounding.
  void (*add)(Number number, void* weight, const float* update, std::int64_t count, Rounding rounding,
              std::int64_t first_column);

  // accumulate_second_moment as a whole, for checked sizes above zero; null where it is made of the tiles
  // above.
  void (*second_moment)(float* total, std::int64_t total_stride, const void* keys, std::int64_t keys_stride,
                        std::int64_t tokens, std::int64_t size, Number number, int threads);
};

// Every instruction set that was compiled in and runs here, the fastest first.
std::vector<const Simd*> supported_simds();

// The named one, or the fastest where the name is empty; throws std::invalid_argument for any other name.
const Simd& find_simd(const std::string& name);

}  // namespace rocr
