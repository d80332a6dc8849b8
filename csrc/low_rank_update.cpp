// Low-rank updates on the CPU: weight += scale * left @ right. A weight is read once and written once.
//
//                 right, packed as panels of block_columns columns, in L2
//              +--------------+--------------+--------------+
//    tile_rows | piece        | piece        | piece        |   strip, with one packed panel of scale * left
//              +--------------+--------------+--------------+
//    tile_rows | piece        | piece        | piece        |   strip
//              +--------------+--------------+--------------+
//              piece_columns
//
// A block, at most block_strips strips, is one item. The sums of a piece stay in L1 until they are added to the
// weight and rounded. Ranks above max_sum_depth are split into slices; the sums of a block are then kept until the
// last slice.
#include "low_rank_update.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace rocr {
namespace {

// A block of a weight is one item. It consists of strips of tile_rows rows, and a strip of pieces.
constexpr std::int64_t block_strips = 64;           // enough to amortize packing right
constexpr std::int64_t max_right_floats = 1 << 17;  // of right for a block: 512 KiB, which fit in L2
constexpr std::int64_t max_block_columns = 4096;
constexpr std::int64_t max_piece_columns = 480;  // few enough for the sums of a piece to fit in L1

struct Block {
  std::int64_t update, row, column;  // index of the update; first row and column of the block
};

// A part of a strip, in bytes. rows <= 0: the piece is empty.
struct Piece {
  const char* weight;
  std::int64_t stride, rows, bytes;
};

// Memory of one worker.
struct Scratch {
  float* left;   // a panel, the left factor of products
  float* right;  // panels of a block
  float* sums;   // of a piece, or of a block if the rank has several slices
};

struct Call {
  const std::vector<LowRankUpdate>& updates;
  const Simd& simd;
  float scale;
  bool stochastic, keep_zeros;
  std::uint64_t seed;
  std::int64_t max_rank, depth;  // depth: of a slice of the rank
  std::int64_t block_rows, block_columns, piece_columns;

  bool has_slices() const { return max_rank > depth; }
  std::int64_t left_floats() const { return divide_up(depth * simd.tile_rows, line_floats) * line_floats; }
  std::int64_t right_floats() const { return depth * block_columns; }
  std::int64_t sum_floats() const {
    return has_slices() ? block_rows * block_columns : simd.tile_rows * piece_columns;
  }

  std::vector<Block> blocks() const;
  void update_block(Block block, Scratch scratch) const;
  Piece piece(Block block, std::int64_t row, std::int64_t column) const;
  void pack_left(const LowRankUpdate& update, std::int64_t row, std::int64_t first, std::int64_t steps,
                 float* left) const;
  void multiply_piece(std::int64_t columns, std::int64_t steps, const float* left, const float* right,
                      float* sums, bool accumulate, Piece next) const;
  void add_piece(Block block, std::int64_t row, std::int64_t column, std::int64_t columns,
                 const float* sums) const;
  std::int64_t sums_stride() const { return has_slices() ? block_columns : piece_columns; }
};

Call plan(const std::vector<LowRankUpdate>& updates, const Simd& simd, float scale, bool stochastic, bool keep_zeros,
          std::uint64_t seed, int threads) {
  std::int64_t rank = 1, rows = 1, columns = 1;
  for (const LowRankUpdate& update : updates) {
    rank = std::max(rank, update.rank);
    rows = std::max(rows, update.rows);
    columns = std::max(columns, update.columns);
  }
  const std::int64_t depth = std::min(rank, max_sum_depth);
  const std::int64_t pieces =
      std::min({max_right_floats / depth, max_block_columns, columns}) / max_piece_columns;
  const std::int64_t piece_columns =
      std::min(divide_up(columns, simd.tile_columns), max_piece_columns / simd.tile_columns) *
      simd.tile_columns;
  const std::int64_t block_columns = std::max<std::int64_t>(pieces, 1) * piece_columns;
  // Small weights have smaller blocks, so that every thread gets some.
  const std::int64_t strips = std::min(block_strips, divide_up(divide_up(rows, 4 * threads), simd.tile_rows));
  return {updates, simd,  scale,         stochastic,   keep_zeros, seed, rank, depth, strips * simd.tile_rows,
          block_columns, piece_columns};
}

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
  const std::int64_t rows = std::min(block_rows, update.rows - block.row);
  const std::int64_t columns = std::min(block_columns, update.columns - block.column);
  for (std::int64_t first = 0; first < update.rank; first += depth) {
    const std::int64_t steps = std::min(depth, update.rank - first);
    const float* right = update.right + first * update.columns + block.column;
    simd.pack(DType::float32, right, update.columns, steps, columns, scratch.right);
    for (std::int64_t row = 0; row < rows; row += simd.tile_rows) {
      pack_left(update, block.row + row, first, steps, scratch.left);
      for (std::int64_t column = 0; column < columns; column += piece_columns) {
        const std::int64_t count = std::min(piece_columns, columns - column);
        const bool ends_strip = column + count == columns;
        const Piece next =
            piece(block, ends_strip ? row + simd.tile_rows : row, ends_strip ? 0 : column + count);
        float* sums = scratch.sums + (has_slices() ? row * block_columns + column : 0);
        multiply_piece(count, steps, scratch.left, scratch.right + column * steps, sums, first > 0, next);
        if (first + steps == update.rank)
          add_piece(block, block.row + row, block.column + column, count, sums);
      }
    }
  }
}

Piece Call::piece(Block block, std::int64_t row, std::int64_t column) const {
  const LowRankUpdate& update = updates[block.update];
  const std::int64_t bytes = bytes_of(update.dtype);
  row += block.row;
  column += block.column;
  return {static_cast<const char*>(update.weight) + (row * update.stride + column) * bytes,
          update.stride * bytes, std::min(simd.tile_rows, update.rows - row),
          std::min(piece_columns, update.columns - column) * bytes};
}

// Packs scale * left as a panel; rows beyond the last are zeros.
void Call::pack_left(const LowRankUpdate& update, std::int64_t row, std::int64_t first, std::int64_t steps,
                     float* left) const {
  const std::int64_t rows = std::min(simd.tile_rows, update.rows - row);
  const float* source = update.left + row * update.rank + first;
  std::fill(left, left + steps * simd.tile_rows, 0.0f);
  for (std::int64_t step = 0; step < steps; ++step) {
    for (std::int64_t i = 0; i < rows; ++i)
      left[step * simd.tile_rows + i] = scale * source[i * update.rank + step];
  }
}

// Each product prefetches its columns of the next piece: more at once would stall on memory.
void Call::multiply_piece(std::int64_t columns, std::int64_t steps, const float* left, const float* right,
                          float* sums, bool accumulate, Piece next) const {
  const std::int64_t tile_bytes = next.bytes * simd.tile_columns / piece_columns;
  for (std::int64_t column = 0; column < columns; column += simd.tile_columns, next.weight += tile_bytes) {
    const float* panel = right + column * steps;
    const char* line = next.weight;
    for (std::int64_t row = 0; row < next.rows; ++row, line += next.stride) {
      for (std::int64_t byte = 0; byte < tile_bytes; byte += 64) __builtin_prefetch(line + byte, 1);
    }
    simd.multiply(columns - column, steps, left, simd.tile_rows, panel, sums + column, sums_stride(),
                  accumulate, panel);
  }
}

// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
std::uint64_t mix(std::uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
  return bits ^ bits >> 31;
}

void Call::add_piece(Block block, std::int64_t row, std::int64_t column, std::int64_t columns,
                     const float* sums) const {
  const LowRankUpdate& update = updates[block.update];
  const std::int64_t end_row = std::min(row + simd.tile_rows, update.rows);
  for (; row < end_row; ++row, sums += sums_stride()) {
    char* weight =
        static_cast<char*>(update.weight) + (row * update.stride + column) * bytes_of(update.dtype);
    const Rounding rounding{keep_zeros, stochastic, mix(mix(mix(seed) + block.update) + row)};
    simd.add(update.dtype, weight, sums, columns, rounding, column);
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

void low_rank_update(const std::vector<LowRankUpdate>& updates, float scale, bool stochastic, bool keep_zeros,
                     std::uint64_t seed, int threads, const Simd& simd) {
  if (threads < 1)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", but must be at least 1.");
  std::int64_t multiplications = 0;
  for (const LowRankUpdate& update : updates) {
    check(update);
    // Reading and writing an element takes about as long as 16 multiplications.
    multiplications += update.rows * update.columns * (update.rank + 16);
  }
  threads = useful_threads(threads, multiplications);
  const Call call = plan(updates, simd, scale, stochastic, keep_zeros, seed, threads);
  const std::vector<Block> blocks = call.blocks();
  if (blocks.empty()) return;
  const std::int64_t worker_floats = call.left_floats() + call.right_floats() + call.sum_floats();
  const Buffer memory(threads * worker_floats);
  run_phases(threads, 1, static_cast<std::int64_t>(blocks.size()),
             [&](int worker, std::int64_t, std::int64_t item) {
               float* left = memory.data() + worker * worker_floats;
               float* right = left + call.left_floats();
               call.update_block(blocks[item], {left, right, right + call.right_floats()});
             });
}

}  // namespace rocr
