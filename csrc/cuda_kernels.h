// The CUDA kernels as functions of addresses, sizes and a stream. They run on the current device and do not wait for
// it. Each returns 0, or an error code that cuda_error describes.
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

// The items of a launch: Schedule of kernels/_common.py, for square tiles of cuda_tile_width.
struct CudaSchedule {
  std::int32_t whole;         // the first tiles, one item each
  std::int32_t splits;        // items that share each remaining tile
  std::int32_t split_tokens;  // tokens of an item of a remaining tile
  std::int32_t items;
  std::int32_t clusters;      // pairs of thread blocks to launch
};

struct CudaKeys {
  DType dtype;  // bfloat16 or float16
  std::int64_t tokens, width, key_stride, total_stride;
};

constexpr std::int64_t cuda_tile_width = 256;
constexpr std::size_t cuda_maximum_layers = 16;

// Adds the sum of k kᵀ over the rows k of keys to the lower triangle of each total; sm_90 only. Keys start at
// multiples of 16 bytes and their row stride is a multiple of 8; totals start at multiples of 8 bytes and their row
// stride is even. slices: cuda_tile_width² zeros for each item beyond the whole ones.
int cuda_accumulate_second_moments(const std::vector<CudaSecondMoment>& layers, const CudaKeys& keys,
                                   const CudaSchedule& schedule, float* slices, std::uintptr_t stream);

// A description of an error code.
std::string cuda_error(int code);

}  // namespace rocr
