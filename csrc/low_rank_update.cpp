#include "low_rank_update.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace rocr {
namespace {

constexpr std::int64_t block_strips = 16;       // of tile_rows rows each: what one packing of right serves
constexpr std::int64_t panel_numbers = 1 << 17;  // of right: 512 KiB, so that they stay in L2
constexpr std::int64_t max_columns = 4096;

struct Block {
  std::int64_t update, first_row, first_column;
};

// Memory of one worker, big enough for any block.
struct Scratch {
  float* rows;     // panel of left
  float* columns;  // panels of right
  float* sums;     // update of the block, or of one strip of it where the rank fits in one slice
};

struct Call {
  const std::vector<LowRankUpdate>& updates;
  float scale;
  bool stochastic;
  std::uint64_t seed;
  const Simd& simd;
  std::int64_t depth;          // of a slice of the rank
  std::int64_t block_rows;
  std::int64_t block_columns;  // a multiple of tile_columns

  std::vector<Block> blocks() const;
  void update_block(Block block, Scratch scratch) const;
  void pack_left(const LowRankUpdate& update, std::int64_t first_row, std::int64_t first, std::int64_t depth,
                 float* rows) const;
  void add_strip(Block block, std::int64_t first_row, const float* sums) const;
};

std::vector<Block> Call::blocks() const {
  std::vector<Block> blocks;
  for (std::size_t index = 0; index < updates.size(); ++index) {
    if (updates[index].rank == 0) continue;
    for (std::int64_t row = 0; row < updates[index].rows; row += block_rows) {
      for (std::int64_t column = 0; column < updates[index].columns; column += block_columns) {
        blocks.push_back({static_cast<std::int64_t>(index), row, column});
      }
    }
  }
  return blocks;
}

void Call::update_block(Block block, Scratch scratch) const {
  const LowRankUpdate& update = updates[block.update];
  const std::int64_t end_row = std::min(block.first_row + block_rows, update.rows);
  const std::int64_t columns = std::min(block_columns, update.columns - block.first_column);
  for (std::int64_t first = 0; first < update.rank; first += depth) {
    const std::int64_t steps = std::min(depth, update.rank - first);
    const bool is_last = first + steps == update.rank;
    const float* right = update.right + first * update.columns + block.first_column;
    simd.pack(Number::float32, right, update.columns, steps, columns, scratch.columns);
    for (std::int64_t row = block.first_row; row < end_row; row += simd.tile_rows) {
      float* sums = scratch.sums + (update.rank > depth ? (row - block.first_row) * block_columns : 0);
      pack_left(update, row, first, steps, scratch.rows);
      for (std::int64_t column = 0; column < columns; column += simd.tile_columns) {
        simd.multiply(columns - column, steps, scratch.rows, simd.tile_rows, scratch.columns + column * steps,
                      sums + column, block_columns, first > 0);
      }
      if (is_last) add_strip(block, row, sums);
    }
  }
}

// A panel of scale * left, with zeros for the rows beyond the last.
void Call::pack_left(const LowRankUpdate& update, std::int64_t first_row, std::int64_t first, std::int64_t depth,
                     float* rows) const {
  for (std::int64_t i = 0; i < simd.tile_rows; ++i) {
    const float* source = update.left + (first_row + i) * update.rank + first;
    const bool is_there = first_row + i < update.rows;
    for (std::int64_t step = 0; step < depth; ++step) {
      rows[step * simd.tile_rows + i] = is_there ? scale * source[step] : 0.0f;
    }
  }
}

// SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).
std::uint64_t mix(std::uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
  return bits ^ bits >> 31;
}

void Call::add_strip(Block block, std::int64_t first_row, const float* sums) const {
  const LowRankUpdate& update = updates[block.update];
  const std::int64_t columns = std::min(block_columns, update.columns - block.first_column);
  for (std::int64_t i = 0; i < std::min(simd.tile_rows, update.rows - first_row); ++i) {
    const std::int64_t row = first_row + i;
    char* weight = static_cast<char*>(update.weight) +
                   (row * update.stride + block.first_column) * bytes_of(update.number);
    const Rounding rounding{stochastic, mix(mix(seed + block.update) + row)};
    simd.add(update.number, weight, sums + i * block_columns, columns, rounding, block.first_column);
  }
}

void check(const LowRankUpdate& update) {
  if (update.rows >= 0 && update.columns >= 0 && update.rank >= 0 && update.stride >= update.columns) return;
  throw std::invalid_argument("A low-rank update needs sizes >= 0 and a stride >= columns, but got " +
                              std::to_string(update.rows) + " rows, " + std::to_string(update.columns) +
                              " columns, rank " + std::to_string(update.rank) + " and stride " +
                              std::to_string(update.stride) + ".");
}

}  // namespace

void low_rank_update(const std::vector<LowRankUpdate>& updates, float scale, bool stochastic, std::uint64_t seed,
                     int threads, const Simd& simd) {
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ", but must be at least 1.");
  std::int64_t rank = 1, columns = 1;
  for (const LowRankUpdate& update : updates) {
    check(update);
    rank = std::max(rank, update.rank);
    columns = std::max(columns, update.columns);
  }
  const std::int64_t depth = std::min(rank, simd.panel_depth);
  const std::int64_t panels = std::min({panel_numbers / depth, max_columns, columns + simd.tile_columns - 1}) /
                              simd.tile_columns;
  const Call call{updates, scale, stochastic, seed, simd, depth, block_strips * simd.tile_rows,
                  std::max<std::int64_t>(panels, 1) * simd.tile_columns};
  const std::vector<Block> blocks = call.blocks();
  if (blocks.empty()) return;

  const std::int64_t row_numbers = depth * simd.tile_rows + 16, column_numbers = depth * call.block_columns;
  const std::int64_t sum_numbers = (rank > depth ? call.block_rows : simd.tile_rows) * call.block_columns;
  const std::int64_t worker_numbers = row_numbers / 16 * 16 + column_numbers + sum_numbers;
  const Buffer memory(threads * worker_numbers);
  run_phases(threads, 1, static_cast<std::int64_t>(blocks.size()), [&](int worker, std::int64_t, std::int64_t item) {
    float* columns = memory.data() + worker * worker_numbers;
    float* sums = columns + column_numbers;
    call.update_block(blocks[item], {sums + sum_numbers, columns, sums});
  });
}

}  // namespace rocr
