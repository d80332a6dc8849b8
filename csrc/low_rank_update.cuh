// Low-rank updates with float32 multiply-adds. An item is a tile of a weight. Its block reads the tile, stages both
// factors in shared memory, rank_step ranks at a time, sums their products, rounds once and writes the tile.
#pragma once

#include "cuda_kernels.h"
#include "cuda_convert.cuh"
#include "cuda_rounding.cuh"

namespace rocr {

constexpr int update_warps = 8;
constexpr int update_threads = 32 * update_warps;
constexpr int update_columns = 256;  // of a tile, 8 for each lane
constexpr int rank_step = 16;         // ranks that are staged together
constexpr int maximum_updates = 128;  // layers of a launch
constexpr int warp_rows = 4;          // rows of a tile for each warp
constexpr int update_rows = warp_rows * update_warps;
constexpr int update_blocks = 2;  // on a multiprocessor: one computes while the other waits for memory
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

// Eight neighbouring elements of a row, moved in one access if they start at a multiple of 16 bytes.
template <DType dtype>
struct alignas(16) Eight {
  Stored<dtype> values[8];
};

template <DType dtype, bool aligned>
__device__ Eight<dtype> load(const Stored<dtype>* place, int count) {
  Eight<dtype> eight{};
  if (aligned && count > 0) eight = *reinterpret_cast<const Eight<dtype>*>(place);
#pragma unroll
  for (int index = 0; index < 8; ++index) {
    if (!aligned && index < count) eight.values[index] = place[index];
  }
  return eight;
}

template <DType dtype, bool aligned>
__device__ void store(const Eight<dtype>& eight, Stored<dtype>* place, int count) {
  if (aligned && count > 0) *reinterpret_cast<Eight<dtype>*>(place) = eight;
#pragma unroll
  for (int index = 0; index < 8; ++index) {
    if (!aligned && index < count) place[index] = eight.values[index];
  }
}

struct alignas(16) Four {
  float values[4];
};

// Copies `steps` ranks of the factors to shared memory. Columns 0-3 and 4-7 of a lane go to different halves of a row,
// so that neighbouring lanes read neighbouring 16 bytes.
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

// Adds the products of the staged ranks to the lane's part of the tile.
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
        sum[row][index] = fmaf(left.values[row], first.values[index], sum[row][index]);
        sum[row][index + 4] = fmaf(left.values[row], second.values[index], sum[row][index + 4]);
      }
    }
  }
}

// The code of every thread of a block. aligned: rows start at multiples of 16 bytes and have a multiple of 8 columns.
template <DType dtype, bool aligned, bool stochastic>
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
    auto* own = static_cast<Stored<dtype>*>(arguments.weights[layer]) + own_row * arguments.stride + own_column;

    Eight<dtype> old[warp_rows];
#pragma unroll
    for (int index = 0; index < warp_rows; ++index) {
      const int count = own_row + index < arguments.rows ? arguments.columns - own_column : 0;
      old[index] = load<dtype, aligned>(own + index * arguments.stride, count);
    }
    float sum[warp_rows][8] = {};
    for (int rank = 0; rank < arguments.rank; rank += rank_step) {
      const int steps = arguments.rank - rank < rank_step ? arguments.rank - rank : rank_step;
      __syncthreads();  // all threads have read the previous ranks
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
      if (stochastic) words = philox(arguments.seed, static_cast<std::uint32_t>(eighth), arguments.layers[layer]);
#pragma unroll
      for (int each = 0; each < 8; ++each) {
        float value = fmaf(arguments.scale, sum[index][each], to_float<dtype>(old[index].values[each]));
        if (stochastic) value = round_stochastic<dtype>(value, bits_of(words, each));
        old[index].values[each] = from_float<dtype>(value);
      }
      store<dtype, aligned>(old[index], own + index * arguments.stride, count);
    }
  }
}

}  // namespace rocr
