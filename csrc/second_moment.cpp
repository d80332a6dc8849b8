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
// A block is one item. The threads share one moment, or each takes whole moments of a list (accumulate below).
#include "second_moment.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "moment_kernel.h"
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

// The kernel that is composed of the functions of an instruction set. Tokens are split into slices of at most
// panel_depth.
class PanelKernel : public MomentKernel {
 public:
  PanelKernel(std::int64_t size, DType dtype, const Simd& simd)
      : size_(size), dtype_(dtype), simd_(simd), blocks_(blocks()) {}

  std::int64_t slices(std::int64_t tokens) const override { return divide_up(tokens, simd_.panel_depth); }
  std::int64_t packings() const override { return divide_up(panels(), packed_panels); }
  std::int64_t products() const override { return static_cast<std::int64_t>(blocks_.size()); }
  std::int64_t packed_floats(std::int64_t tokens) const override {
    return panels() * simd_.tile_columns * std::min(tokens, simd_.panel_depth);
  }
  std::int64_t worker_floats() const override { return block_rows * simd_.tile_columns * simd_.panel_depth; }
  void pack(const Moment& moment, std::int64_t slice, std::int64_t item, float* packed) const override;
  void multiply(const Moment& moment, std::int64_t slice, std::int64_t item, const float* packed,
                float* mine) const override;

 private:
  std::int64_t first_token(const Moment& moment, std::int64_t slice) const {
    return moment.tokens * slice / slices(moment.tokens);
  }
  std::int64_t depth(const Moment& moment, std::int64_t slice) const {
    return first_token(moment, slice + 1) - first_token(moment, slice);
  }
  std::int64_t panels() const { return divide_up(size_, simd_.tile_columns); }
  std::vector<Block> blocks() const;
  void split_rows(const float* panels, std::int64_t count, std::int64_t depth, float* strips) const;
  void add_tile(const Moment& moment, Block tile, std::int64_t depth, const float* rows, const float* columns,
                const float* prefetch) const;
  void multiply_panels(std::int64_t count, std::int64_t depth, const float* rows, const float* columns,
                       float* target, std::int64_t stride, bool accumulate, const float* prefetch) const;

  const std::int64_t size_;
  const DType dtype_;
  const Simd& simd_;
  const std::vector<Block> blocks_;
};

// The blocks that intersect the lower triangle, from the longest row of blocks to the shortest.
std::vector<Block> PanelKernel::blocks() const {
  const std::int64_t height = block_rows * simd_.tile_columns, width = block_columns * simd_.tile_columns;
  std::vector<Block> blocks;
  for (std::int64_t row = (size_ - 1) / height * height; row >= 0; row -= height) {
    for (std::int64_t column = 0; column < std::min(row + height, size_); column += width) {
      blocks.push_back({row, column});
    }
  }
  return blocks;
}

void PanelKernel::pack(const Moment& moment, std::int64_t slice, std::int64_t item, float* packed) const {
  const std::int64_t column = item * packed_panels * simd_.tile_columns, steps = depth(moment, slice);
  const std::int64_t count = std::min(packed_panels * simd_.tile_columns, size_ - column);
  const char* source =
      moment.keys + (first_token(moment, slice) * moment.keys_stride + column) * bytes_of(dtype_);
  simd_.pack(dtype_, source, moment.keys_stride, steps, count, packed + column * steps);
}

void PanelKernel::multiply(const Moment& moment, std::int64_t slice, std::int64_t item, const float* packed,
                           float* mine) const {
  const Block block = blocks_[item];
  const std::int64_t steps = depth(moment, slice), panel_floats = simd_.tile_columns * steps;
  const std::int64_t end_row = std::min(block.row + block_rows * simd_.tile_columns, size_);
  const std::int64_t end_column = std::min(block.column + block_columns * simd_.tile_columns, end_row);
  split_rows(packed + block.row * steps, end_row - block.row, steps, mine);
  for (std::int64_t column = block.column; column < end_column; column += simd_.tile_columns) {
    const float* columns = packed + column * steps;
    // The first tiles prefetch the next panel of columns, a cache line per step.
    const float* prefetch = columns + panel_floats;
    for (std::int64_t row = std::max(block.row, column); row < end_row; row += simd_.tile_rows) {
      add_tile(moment, {row, column}, steps, mine + (row - block.row) * steps, columns, prefetch);
      prefetch = std::min(prefetch + steps * line_floats, columns + 2 * panel_floats);
    }
  }
}

// Copies the first `count` columns of panels into strips of tile_rows columns: a step of a strip is contiguous, so that
// a product reads whole cache lines and one stream of them.
void PanelKernel::split_rows(const float* panels, std::int64_t count, std::int64_t depth, float* strips) const {
  for (std::int64_t row = 0; row < count; row += simd_.tile_rows) {
    const std::int64_t row_in_panel = row % simd_.tile_columns;
    const float* source = panels + (row - row_in_panel) * depth + row_in_panel;
    for (std::int64_t step = 0; step < depth; ++step, strips += simd_.tile_rows, source += simd_.tile_columns)
      for (std::int64_t i = 0; i < simd_.tile_rows; i += 4) std::memcpy(strips + i, source + i, 4 * sizeof(float));
  }
}

void PanelKernel::add_tile(const Moment& moment, Block tile, std::int64_t depth, const float* rows,
                           const float* columns, const float* prefetch) const {
  float* target = moment.total + tile.row * moment.total_stride + tile.column;
  if (tile.column + simd_.tile_columns <= tile.row && tile.row + simd_.tile_rows <= size_) {
    multiply_panels(simd_.tile_columns, depth, rows, columns, target, moment.total_stride, true, prefetch);
    return;
  }
  alignas(64) float sums[max_tile_floats];
  const std::int64_t end_row = std::min(tile.row + simd_.tile_rows, size_);
  multiply_panels(end_row - tile.column, depth, rows, columns, sums, simd_.tile_columns, false, prefetch);
  for (std::int64_t row = tile.row; row < end_row; ++row, target += moment.total_stride) {
    const std::int64_t count = std::min(simd_.tile_columns, row + 1 - tile.column);
    for (std::int64_t i = 0; i < count; ++i)
      target[i] += sums[(row - tile.row) * simd_.tile_columns + i];
  }
}

// One tile of a product of panels, in chunks of at most max_sum_depth steps.
void PanelKernel::multiply_panels(std::int64_t count, std::int64_t depth, const float* rows,
                                  const float* columns, float* target, std::int64_t stride, bool accumulate,
                                  const float* prefetch) const {
  const std::int64_t chunks = divide_up(depth, max_sum_depth);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t first = depth * chunk / chunks, steps = depth * (chunk + 1) / chunks - first;
    simd_.multiply(count, steps, rows + first * simd_.tile_rows, simd_.tile_rows,
                   columns + first * simd_.tile_columns, target, stride, accumulate || chunk > 0,
                   prefetch + first * line_floats);
  }
}

// Floats of a cache line: memory that two threads write begins at one.
std::int64_t whole_lines(std::int64_t floats) { return divide_up(floats, line_floats) * line_floats; }

// A slice of the tokens of one of several moments.
struct Slice {
  const Moment* moment;
  std::int64_t index;
};

// All threads on one slice at a time: while it is multiplied, other items pack the next one.
void accumulate_together(const std::vector<Moment>& moments, const MomentKernel& kernel, int threads) {
  std::vector<Slice> slices;
  std::int64_t most_floats = 0;
  for (const Moment& moment : moments) {
    most_floats = std::max(most_floats, kernel.packed_floats(moment.tokens));
    for (std::int64_t index = 0; index < kernel.slices(moment.tokens); ++index) slices.push_back({&moment, index});
  }
  if (slices.empty()) return;
  const std::int64_t half = whole_lines(most_floats), own = whole_lines(kernel.worker_floats());
  const std::int64_t count = static_cast<std::int64_t>(slices.size()), products = kernel.products();
  const std::int64_t halves = threads > 1 && count > 1 ? 2 : 1;  // one thread packs a slice after the last product
  const Buffer packed(halves * half), sums(threads * own);
  run_phases(threads, count + 1, products + kernel.packings(),
             [&](int worker, std::int64_t phase, std::int64_t item) {
               if (item < products) {
                 if (phase == 0) return;
                 const Slice& slice = slices[phase - 1];
                 kernel.multiply(*slice.moment, slice.index, item, packed.data() + (phase - 1) % halves * half,
                                 sums.data() + worker * own);
               } else if (phase < count) {
                 const Slice& slice = slices[phase];
                 kernel.pack(*slice.moment, slice.index, item - products, packed.data() + phase % halves * half);
               }
             });
}

// One thread on each moment, from the longest to the shortest, so that the threads wait for nothing.
void accumulate_apart(std::vector<Moment> moments, const MomentKernel& kernel, int threads) {
  if (moments.empty()) return;
  std::stable_sort(moments.begin(), moments.end(),
                   [](const Moment& one, const Moment& other) { return one.tokens > other.tokens; });
  const std::int64_t count = static_cast<std::int64_t>(moments.size());
  threads = static_cast<int>(std::min<std::int64_t>(threads, count));
  const std::int64_t floats = whole_lines(kernel.packed_floats(moments[0].tokens)),
                     own = whole_lines(kernel.worker_floats());
  const Buffer packed(threads * floats), sums(threads * own);
  run_phases(threads, 1, count, [&](int worker, std::int64_t, std::int64_t item) {
    const Moment& moment = moments[item];
    float* slice_floats = packed.data() + worker * floats;
    for (std::int64_t slice = 0; slice < kernel.slices(moment.tokens); ++slice) {
      for (std::int64_t i = 0; i < kernel.packings(); ++i) kernel.pack(moment, slice, i, slice_floats);
      for (std::int64_t i = 0; i < kernel.products(); ++i)
        kernel.multiply(moment, slice, i, slice_floats, sums.data() + worker * own);
    }
  });
}

// A moment of more than half of a thread's share of all tokens is shared out; the others are one item each. Both
// ways compute the same bytes.
void accumulate(const std::vector<Moment>& moments, std::int64_t size, DType dtype, int threads, const Simd& simd) {
  std::int64_t tokens = 0;
  for (const Moment& moment : moments) tokens += moment.tokens;
  if (tokens == 0 || size == 0) return;
  threads = useful_threads(threads, tokens * size * size / 2);
  std::vector<Moment> together, apart;
  for (const Moment& moment : moments) {
    if (moment.tokens > 0) (moment.tokens > tokens / (2 * threads) ? together : apart).push_back(moment);
  }
  const std::unique_ptr<const MomentKernel> kernel =
      simd.moment_kernel ? simd.moment_kernel(size, dtype) : std::make_unique<PanelKernel>(size, dtype, simd);
  accumulate_together(together, *kernel, threads);
  accumulate_apart(std::move(apart), *kernel, threads);
}

void check_sizes(std::int64_t tokens, std::int64_t size, int threads, std::int64_t total_stride,
                 std::int64_t keys_stride) {
  if (tokens >= 0 && size >= 0 && threads >= 1 && total_stride >= size && keys_stride >= size) return;
  throw std::invalid_argument(
      "A second moment needs tokens >= 0, size >= 0, threads >= 1 and strides >= size, but got " +
      std::to_string(tokens) + " tokens, size " + std::to_string(size) + ", " + std::to_string(threads) +
      " threads, total_stride " + std::to_string(total_stride) + " and keys_stride " +
      std::to_string(keys_stride) + ".");
}

}  // namespace

void accumulate_second_moment(float* total, std::int64_t total_stride, const void* keys,
                              std::int64_t keys_stride, std::int64_t tokens, std::int64_t size, DType dtype,
                              int threads, const Simd& simd) {
  check_sizes(tokens, size, threads, total_stride, keys_stride);
  accumulate({{total, total_stride, static_cast<const char*>(keys), keys_stride, tokens}}, size, dtype, threads,
             simd);
}

void accumulate_grouped_second_moment(float* totals, std::int64_t group_stride, std::int64_t total_stride,
                                      const void* keys, std::int64_t keys_stride,
                                      const std::vector<std::int64_t>& offsets, std::int64_t size, DType dtype,
                                      int threads, const Simd& simd) {
  if (offsets.empty() || offsets[0] < 0 || !std::is_sorted(offsets.begin(), offsets.end())) {
    throw std::invalid_argument("Groups need offsets that begin at 0 or more and ascend.");
  }
  check_sizes(offsets.back(), size, threads, total_stride, keys_stride);
  std::vector<Moment> moments;
  for (std::size_t group = 0; group + 1 < offsets.size(); ++group) {
    moments.push_back({totals + static_cast<std::int64_t>(group) * group_stride, total_stride,
                       static_cast<const char*>(keys) + offsets[group] * keys_stride * bytes_of(dtype), keys_stride,
                       offsets[group + 1] - offsets[group]});
  }
  accumulate(moments, size, dtype, threads, simd);
}

}  // namespace rocr
