// Low-rank updates in float32 multiply-adds. An item is a tile of a weight: its block reads the tile, stages both
// factors in shared memory, some ranks at a time, adds up their products, and writes the tile, rounded once.
#pragma once

#include "cuda_kernels.h"
#include "cuda_numbers.cuh"
#include "cuda_rounding.cuh"

namespace rocr {

constexpr int update_warps = 8;
constexpr int update_threads = 32 * update_warps;
constexpr int update_columns = 256;  // of a tile: 8 for each lane
constexpr int rank_step = 16;        // ranks that are staged together
constexpr int maximum_updates = 128;  // layers of a launch
constexpr int warp_rows = 4;         // rows of a tile that one warp has
constexpr int update_rows = warp_rows * update_warps;
constexpr int update_blocks = 2;     // on a multiprocessor at a time: one computes while the other waits for memory
constexpr std::size_t update_shared_bytes = rank_step * (update_columns + update_rows) * sizeof(float);

// Weights of one shape and layout; left(i, k) and right(k, j) as in CudaLowRankUpdate.
struct UpdateArguments {
  void* weights[maximum_updates];
  const float* lefts[maximum_updates];
  const float* rights[maximum_updates];
  std::uint32_t layers[maximum_updates];
  std::int64_t stride, left_stride, left_rank_stride, right_stride, right_rank_stride;
  int rows, columns, rank, items;
  float scale;
  std::uint64_t seed;
};
static_assert(sizeof(UpdateArguments) <= 4096);

// Eight neighbouring numbers of a row, which are moved at once where they lie at multiples of 16 bytes.
template <Number number>
struct alignas(16) Eight {
  Stored<number> numbers[8];
};

template <Number number, bool aligned>
__device__ Eight<number> load(const Stored<number>* place, int count) {
  Eight<number> eight{};
  if (aligned && count > 0) eight = *reinterpret_cast<const Eight<number>*>(place);
#pragma unroll
  for (int index = 0; index < 8; ++index) {
    if (!aligned && index < count) eight.numbers[index] = place[index];
  }
  return eight;
}

template <Number number, bool aligned>
__device__ void store(const Eight<number>& eight, Stored<number>* place, int count) {
  if (aligned && count > 0) *reinterpret_cast<Eight<number>*>(place) = eight;
#pragma unroll
  for (int index = 0; index < 8; ++index) {
    if (!aligned && index < count) place[index] = eight.numbers[index];
  }
}

struct alignas(16) Four {
  float numbers[4];
};

// Copies `steps` ranks of the factors to shared memory. A lane's columns 0-3 and 4-7 go to different halves of a row:
// neighbouring lanes then read neighbouring 16 bytes.
__device__ inline void stage(const UpdateArguments& arguments, int layer, int row, int column, int rank, int steps,
                             float* rights, float* lefts) {
  for (int index = threadIdx.x; index < steps * update_columns; index += update_threads) {
    const int step = index / update_columns, at = index % update_columns;
    const int place = step * update_columns + at / 4 % 2 * (update_columns / 2) + at / 8 * 4 + at % 4;
    const std::int64_t offset = (column + at) * arguments.right_stride + (rank + step) * arguments.right_rank_stride;
    rights[place] = column + at < arguments.columns ? arguments.rights[layer][offset] : 0;
  }
  for (int index = threadIdx.x; index < steps * update_rows; index += update_threads) {
    const int step = index / update_rows, at = index % update_rows;
    const std::int64_t offset = (row + at) * arguments.left_stride + (rank + step) * arguments.left_rank_stride;
    lefts[index] = row + at < arguments.rows ? arguments.lefts[layer][offset] : 0;
  }
}

// Adds the products of the staged ranks to a lane's part of the tile.
__device__ inline void multiply(const float* rights, const float* lefts, int steps, float (&sum)[warp_rows][8]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 0; step < steps; ++step) {
    const float* right = rights + step * update_columns + lane * 4;
    const Four first = *reinterpret_cast<const Four*>(right);
    const Four second = *reinterpret_cast<const Four*>(right + update_columns / 2);
    const Four left = *reinterpret_cast<const Four*>(lefts + step * update_rows + warp * warp_rows);
#pragma unroll
    for (int row = 0; row < warp_rows; ++row) {
#pragma unroll
      for (int index = 0; index < 4; ++index) {
        sum[row][index] = fmaf(left.numbers[row], first.numbers[index], sum[row][index]);
        sum[row][index + 4] = fmaf(left.numbers[row], second.numbers[index], sum[row][index + 4]);
      }
    }
  }
}

// What every thread of a block runs. aligned: rows start at multiples of 16 bytes and are whole eights long.
template <Number number, bool aligned, bool at_random>
__device__ void update_in_block(const UpdateArguments& arguments) {
  float* rights = static_cast<float*>(dynamic_shared());
  float* lefts = rights + rank_step * update_columns;
  const int tile_columns = (arguments.columns + update_columns - 1) / update_columns;
  const int tiles = (arguments.rows + update_rows - 1) / update_rows * tile_columns;
  for (int item = blockIdx.x; item < arguments.items; item += gridDim.x) {
    const int layer = item / tiles;
    const int row = item % tiles / tile_columns * update_rows, column = item % tile_columns * update_columns;
    const int own_row = row + static_cast<int>(threadIdx.x) / 32 * warp_rows;
    const int own_column = column + static_cast<int>(threadIdx.x) % 32 * 8;
    auto* own = static_cast<Stored<number>*>(arguments.weights[layer]) + own_row * arguments.stride + own_column;

    Eight<number> old[warp_rows];
#pragma unroll
    for (int index = 0; index < warp_rows; ++index) {
      const int count = own_row + index < arguments.rows ? arguments.columns - own_column : 0;
      old[index] = load<number, aligned>(own + index * arguments.stride, count);
    }
    float sum[warp_rows][8] = {};
    for (int rank = 0; rank < arguments.rank; rank += rank_step) {
      const int steps = arguments.rank - rank < rank_step ? arguments.rank - rank : rank_step;
      __syncthreads();  // all have read what was staged before
      stage(arguments, layer, row, column, rank, steps, rights, lefts);
      __syncthreads();
      multiply(rights, lefts, steps, sum);
    }
#pragma unroll
    for (int index = 0; index < warp_rows; ++index) {
      const int count = own_row + index < arguments.rows ? arguments.columns - own_column : 0;
      const std::int64_t eighth =
          static_cast<std::int64_t>(own_row + index) * ((arguments.columns + 7) / 8) + own_column / 8;
      Words words{};
      if (at_random) words = philox(arguments.seed, static_cast<std::uint32_t>(eighth), arguments.layers[layer]);
#pragma unroll
      for (int each = 0; each < 8; ++each) {
        float value = fmaf(arguments.scale, sum[index][each], to_float<number>(old[index].numbers[each]));
        if (at_random) value = round_at_random<number>(value, bits_of(words, each));
        old[index].numbers[each] = from_float<number>(value);
      }
      store<number, aligned>(old[index], own + index * arguments.stride, count);
    }
  }
}

}  // namespace rocr
