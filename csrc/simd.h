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

// Room for the largest register tile.
constexpr std::int64_t max_tile_numbers = 1024;

struct Simd {
  const char* name;
  bool (*is_supported)();

  // A register tile of a product has tile_rows x tile_columns elements. Operands come as panels: for each step of the
  // depth the tile_rows (or tile_columns) numbers of that step, side by side. A group is the smallest number of
  // columns that are whole panels of both kinds.
  std::int64_t tile_rows, tile_columns, group_columns;

  // Steps for which a panel of columns stays in the first cache.
  std::int64_t panel_depth;

  // tile = rowsᵀ columns, or tile += rowsᵀ columns; the rows of tile lie `stride` apart.
  void (*multiply)(std::int64_t depth, const float* rows, const float* columns, float* tile, std::int64_t stride,
                   bool accumulate);

  // Copies `count` columns of a matrix with `depth` rows into a group's panels, the columns that are missing as zeros.
  // Panels of rows may be null: not wanted.
  void (*pack)(Number number, const void* source, std::int64_t stride, std::int64_t depth, std::int64_t count,
               float* rows, float* columns);

  // weight += update, rounded once; first_column tells a row's numbers apart under stochastic rounding.
  void (*add)(Number number, void* weight, const float* update, std::int64_t count, Rounding rounding,
              std::int64_t first_column);
};

// Every instruction set that was compiled in and runs here, the fastest first.
std::vector<const Simd*> supported_simds();

// The named one, or the fastest where the name is empty; throws std::invalid_argument for any other name.
const Simd& find_simd(const std::string& name);

}  // namespace rocr
