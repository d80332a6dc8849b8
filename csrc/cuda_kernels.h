// The CUDA kernels as plain calls: addresses, sizes and a stream. They run on the device that is current. Each returns
// 0, or a code that cuda_error puts into words; none waits for the device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simd.h"

namespace rocr {

// One total (width, width) and the keys (tokens, width) of its layer, both in device memory.
struct CudaSecondMoment {
  const void* keys;
  float* total;
};

// How tiles are shared out; computed by rocr_kernels.schedule for square tiles of cuda_tile_width.
struct CudaSchedule {
  std::int32_t whole;         // tiles that are one item each
  std::int32_t splits;        // items that share each of the other tiles
  std::int32_t split_tokens;  // tokens of such an item
  std::int32_t items;
  std::int32_t clusters;      // pairs of thread blocks to launch
};

struct CudaKeys {
  Number number;  // bfloat16 or float16
  std::int64_t tokens, width, key_stride, total_stride;
};

constexpr std::int64_t cuda_tile_width = 256;
constexpr std::size_t cuda_maximum_layers = 16;

// Adds the sum of k kᵀ over the rows k of keys to the lower triangle of each total; sm_90 only. Keys start at
// multiples of 16 bytes, rows a multiple of 8 numbers apart; totals at multiples of 8 bytes, rows an even number apart.
// slices: cuda_tile_width² zeros for each item beyond the whole ones.
int cuda_accumulate_second_moments(const std::vector<CudaSecondMoment>& layers, const CudaKeys& keys,
                                   const CudaSchedule& schedule, float* slices, std::uintptr_t stream);

// One weight (rows, columns), its rows `stride` numbers apart, and its float32 factors: left(i, k) lies at
// i * left_stride + k * left_rank_stride, right(k, j) at j * right_stride + k * right_rank_stride.
struct CudaLowRankUpdate {
  void* weight;
  const float* left;
  const float* right;
  std::int64_t rows, columns, stride, rank;
  std::int64_t left_stride, left_rank_stride, right_stride, right_rank_stride;
  std::uint32_t layer;  // tells the random numbers of layers apart
};

// Adds scale * left right to every weight in float32, rounded once, to nearest even or (16-bit weights only) at random;
// sm_80 and later.
int cuda_low_rank_update(const std::vector<CudaLowRankUpdate>& updates, Number number, float scale, bool stochastic,
                         std::uint64_t seed, std::uintptr_t stream);

// What went wrong, in words.
std::string cuda_error(int code);

}  // namespace rocr
