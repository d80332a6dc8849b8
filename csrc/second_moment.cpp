#include "second_moment.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace rocr {
namespace {

// Tiles in a block of work, down and across: small enough to share out evenly, and its panels of rows fit in L2.
constexpr std::int64_t block_tiles = 8;

struct Block {
  std::int64_t first_row, first_column;
};

// One call: what is to be added up, and its panels. Tokens are cut into slices of the depth that a panel can have.
struct SecondMoment {
  float* total;
  std::int64_t total_stride;
  const char* keys;
  std::int64_t keys_stride, tokens, size;
  Number number;
  const Simd& simd;

  std::int64_t slices() const { return (tokens + simd.panel_depth - 1) / simd.panel_depth; }
  std::int64_t first_token(std::int64_t slice) const { return tokens * slice / slices(); }
  std::int64_t depth(std::int64_t slice) const { return first_token(slice + 1) - first_token(slice); }
  std::int64_t groups() const { return (size + simd.group_columns - 1) / simd.group_columns; }
  std::int64_t panel_numbers() const { return groups() * simd.group_columns * std::min(tokens, simd.panel_depth); }

  std::vector<Block> blocks() const;
  void pack(std::int64_t slice, std::int64_t group, float* rows, float* columns) const;
  void add_block(std::int64_t slice, Block block, const float* rows, const float* columns) const;
  void add_tile(std::int64_t depth, std::int64_t row, std::int64_t column, const float* rows,
                const float* columns) const;
};

// The blocks that meet the lower triangle, from the longest row of blocks to the shortest.
std::vector<Block> SecondMoment::blocks() const {
  const std::int64_t height = block_tiles * simd.tile_rows, width = block_tiles * simd.tile_columns;
  std::vector<Block> blocks;
  for (std::int64_t row = (size - 1) / height * height; row >= 0; row -= height) {
    for (std::int64_t column = 0; column < std::min(row + height, size); column += width) {
      blocks.push_back({row, column});
    }
  }
  return blocks;
}

void SecondMoment::pack(std::int64_t slice, std::int64_t group, float* rows, float* columns) const {
  const std::int64_t first_column = group * simd.group_columns;
  const std::int64_t count = std::min(simd.group_columns, size - first_column);
  const char* source = keys + (first_token(slice) * keys_stride + first_column) * bytes_of(number);
  const std::int64_t offset = first_column * depth(slice);
  simd.pack(number, source, keys_stride, depth(slice), count, rows + offset, columns + offset);
}

void SecondMoment::add_block(std::int64_t slice, Block block, const float* rows, const float* columns) const {
  const std::int64_t end_row = std::min(block.first_row + block_tiles * simd.tile_rows, size);
  const std::int64_t end_column = std::min(block.first_column + block_tiles * simd.tile_columns, end_row);
  for (std::int64_t column = block.first_column; column < end_column; column += simd.tile_columns) {
    for (std::int64_t row = block.first_row; row < end_row; row += simd.tile_rows) {
      if (column < row + simd.tile_rows) add_tile(depth(slice), row, column, rows, columns);
    }
  }
}

void SecondMoment::add_tile(std::int64_t depth, std::int64_t row, std::int64_t column, const float* rows,
                            const float* columns) const {
  float* target = total + row * total_stride + column;
  rows += row * depth;
  columns += column * depth;
  if (column + simd.tile_columns - 1 <= row && row + simd.tile_rows <= size) {
    simd.multiply(depth, rows, columns, target, total_stride, true);
    return;
  }
  alignas(64) float tile[max_tile_numbers];
  simd.multiply(depth, rows, columns, tile, simd.tile_columns, false);
  for (std::int64_t i = 0; i < std::min(simd.tile_rows, size - row); ++i) {
    const std::int64_t count = std::min(simd.tile_columns, row + i + 1 - column);
    for (std::int64_t j = 0; j < count; ++j) target[i * total_stride + j] += tile[i * simd.tile_columns + j];
  }
}

}  // namespace

void accumulate_second_moment(float* total, std::int64_t total_stride, const void* keys, std::int64_t keys_stride,
                              std::int64_t tokens, std::int64_t size, Number number, int threads, const Simd& simd) {
  if (tokens < 0 || size < 0 || threads < 1 || total_stride < size || keys_stride < size) {
    throw std::invalid_argument("A second moment needs tokens >= 0, size >= 0, threads >= 1 and strides >= size, but got " +
                                std::to_string(tokens) + " tokens, size " + std::to_string(size) + ", " +
                                std::to_string(threads) + " threads, total_stride " + std::to_string(total_stride) +
                                " and keys_stride " + std::to_string(keys_stride) + ".");
  }
  if (tokens == 0 || size == 0) return;
  const SecondMoment work{total, total_stride, static_cast<const char*>(keys), keys_stride, tokens, size, number, simd};
  const std::vector<Block> blocks = work.blocks();
  const std::int64_t block_count = static_cast<std::int64_t>(blocks.size());
  // A phase adds up one slice while it packs the next one into the other half of the panels.
  const std::int64_t half = work.panel_numbers();
  const Buffer rows(2 * half), columns(2 * half);
  run_phases(threads, work.slices() + 1, block_count + work.groups(), [&](int, std::int64_t phase, std::int64_t item) {
    if (item >= block_count) {
      const std::int64_t offset = phase % 2 * half;
      if (phase < work.slices()) work.pack(phase, item - block_count, rows.data() + offset, columns.data() + offset);
    } else if (phase > 0) {
      const std::int64_t offset = (phase - 1) % 2 * half;
      work.add_block(phase - 1, blocks[item], rows.data() + offset, columns.data() + offset);
    }
  });
}

}  // namespace rocr
