// The second moment on the CPU: total += keysᵀ keys, in float32, lower triangle only.
//
// Tokens are split into slices. The keys of a slice are packed once, as float32 panels of tile_columns columns. A
// tile of the total is the product of tile_rows columns of one panel and all columns of another:
//
//                 block_columns panels of columns
//              +------+------+------+------+-----
//   block_rows | tile | tile | tile | tile | ...     tile: tile_rows x tile_columns
//   panels     +------+------+------+------+-----
//   of rows    | tile | tile | tile | tile | ...
//              +------+------+------+------+-----
//
// A block is one item. While the blocks of one slice are multiplied, other items pack the next slice.
#include "second_moment.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace rocr {
namespace {

// Panels of rows and of columns of a block: small enough for even shares among threads, large enough to reuse
// each panel of columns while it is in L1.
constexpr std::int64_t block_rows = 2;
constexpr std::int64_t block_columns = 16;

// Panels that are packed as one item.
constexpr std::int64_t packed_panels = 4;

// First row and first column of a block or a tile of the total.
struct Block {
  std::int64_t row, column;
};

// The arguments of one call. Tokens are split into slices of at most panel_depth.
struct SecondMoment {
  float* total;
  std::int64_t total_stride;
  const char* keys;
  std::int64_t keys_stride, tokens, size;
  DType dtype;
  const Simd& simd;

  std::int64_t slices() const { return divide_up(tokens, simd.panel_depth); }
  std::int64_t first_token(std::int64_t slice) const { return tokens * slice / slices(); }
  std::int64_t depth(std::int64_t slice) const { return first_token(slice + 1) - first_token(slice); }
  std::int64_t panels() const { return divide_up(size, simd.tile_columns); }

  std::vector<Block> blocks() const;
  void pack(std::int64_t slice, std::int64_t first_panel, float* panels) const;
  void add_block(std::int64_t slice, Block block, const float* panels) const;
  void add_tile(Block tile, std::int64_t depth, const float* rows, const float* columns,
                const float* prefetch) const;
  void multiply(std::int64_t count, std::int64_t depth, const float* rows, const float* columns,
                float* target, std::int64_t stride, bool accumulate, const float* prefetch) const;
};

// The blocks that intersect the lower triangle, from the longest row of blocks to the shortest.
std::vector<Block> SecondMoment::blocks() const {
  const std::int64_t height = block_rows * simd.tile_columns, width = block_columns * simd.tile_columns;
  std::vector<Block> blocks;
  for (std::int64_t row = (size - 1) / height * height; row >= 0; row -= height) {
    for (std::int64_t column = 0; column < std::min(row + height, size); column += width) {
      blocks.push_back({row, column});
    }
  }
  return blocks;
}

void SecondMoment::pack(std::int64_t slice, std::int64_t first_panel, float* panels) const {
  const std::int64_t column = first_panel * simd.tile_columns;
  const std::int64_t count = std::min(packed_panels * simd.tile_columns, size - column);
  const char* source = keys + (first_token(slice) * keys_stride + column) * bytes_of(dtype);
  simd.pack(dtype, source, keys_stride, depth(slice), count, panels + column * depth(slice));
}

void SecondMoment::add_block(std::int64_t slice, Block block, const float* panels) const {
  const std::int64_t panel_floats = simd.tile_columns * depth(slice);
  const std::int64_t end_row = std::min(block.row + block_rows * simd.tile_columns, size);
  const std::int64_t end_column = std::min(block.column + block_columns * simd.tile_columns, end_row);
  for (std::int64_t column = block.column; column < end_column; column += simd.tile_columns) {
    const float* columns = panels + column * depth(slice);
    // The first tiles prefetch the next panel of columns, a cache line per step.
    const float* prefetch = columns + panel_floats;
    for (std::int64_t row = std::max(block.row, column); row < end_row; row += simd.tile_rows) {
      const std::int64_t row_in_panel = row % simd.tile_columns;
      const float* rows = panels + (row - row_in_panel) * depth(slice) + row_in_panel;
      add_tile({row, column}, depth(slice), rows, columns, prefetch);
      prefetch = std::min(prefetch + depth(slice) * line_floats, columns + 2 * panel_floats);
    }
  }
}

void SecondMoment::add_tile(Block tile, std::int64_t depth, const float* rows, const float* columns,
                            const float* prefetch) const {
  float* target = total + tile.row * total_stride + tile.column;
  if (tile.column + simd.tile_columns <= tile.row && tile.row + simd.tile_rows <= size) {
    multiply(simd.tile_columns, depth, rows, columns, target, total_stride, true, prefetch);
    return;
  }
  alignas(64) float sums[max_tile_floats];
  const std::int64_t end_row = std::min(tile.row + simd.tile_rows, size);
  multiply(end_row - tile.column, depth, rows, columns, sums, simd.tile_columns, false, prefetch);
  for (std::int64_t row = tile.row; row < end_row; ++row, target += total_stride) {
    const std::int64_t count = std::min(simd.tile_columns, row + 1 - tile.column);
    for (std::int64_t i = 0; i < count; ++i) target[i] += sums[(row - tile.row) * simd.tile_columns + i];
  }
}

// One tile of a product of panels, in chunks of at most max_sum_depth steps.
void SecondMoment::multiply(std::int64_t count, std::int64_t depth, const float* rows, const float* columns,
                            float* target, std::int64_t stride, bool accumulate, const float* prefetch) const {
  const std::int64_t chunks = divide_up(depth, max_sum_depth);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t first = depth * chunk / chunks, steps = depth * (chunk + 1) / chunks - first;
    simd.multiply(count, steps, rows + first * simd.tile_columns, simd.tile_columns,
                  columns + first * simd.tile_columns, target, stride, accumulate || chunk > 0,
                  prefetch + first * line_floats);
  }
}

}  // namespace

void accumulate_second_moment(float* total, std::int64_t total_stride, const void* keys,
                              std::int64_t keys_stride, std::int64_t tokens, std::int64_t size, DType dtype,
                              int threads, const Simd& simd) {
  if (tokens < 0 || size < 0 || threads < 1 || total_stride < size || keys_stride < size) {
    throw std::invalid_argument(
        "A second moment needs tokens >= 0, size >= 0, threads >= 1 and strides >= size, but got " +
        std::to_string(tokens) + " tokens, size " + std::to_string(size) + ", " + std::to_string(threads) +
        " threads, total_stride " + std::to_string(total_stride) + " and keys_stride " +
        std::to_string(keys_stride) + ".");
  }
  if (tokens == 0 || size == 0) return;
  if (simd.second_moment) {
    return simd.second_moment(total, total_stride, keys, keys_stride, tokens, size, dtype, threads);
  }
  const SecondMoment work{total,  total_stride, static_cast<const char*>(keys), keys_stride, tokens, size,
                          dtype, simd};
  const std::vector<Block> blocks = work.blocks();
  const std::int64_t block_count = static_cast<std::int64_t>(blocks.size());
  const std::int64_t packings = divide_up(work.panels(), packed_panels);
  // A phase multiplies one slice and packs the next one into the other half of the panels.
  const std::int64_t half = work.panels() * simd.tile_columns * std::min(tokens, simd.panel_depth);
  const Buffer panels(2 * half);
  run_phases(useful_threads(threads, tokens * size * size / 2), work.slices() + 1, block_count + packings,
             [&](int, std::int64_t phase, std::int64_t item) {
               float* next = panels.data() + phase % 2 * half;
               const float* current = panels.data() + (phase + 1) % 2 * half;
               if (item < block_count) {
                 if (phase > 0) work.add_block(phase - 1, blocks[item], current);
               } else if (phase < work.slices()) {
                 work.pack(phase, (item - block_count) * packed_panels, next);
               }
             });
}

}  // namespace rocr
