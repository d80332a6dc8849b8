#pragma once

#include <vector>

#include "simd.h"

namespace rocr {

// One weight (rows, columns), its rows `stride` elements apart, with left (rows, rank) and right (rank, columns),
// both contiguous.
struct LowRankUpdate {
  void* weight;
  DType dtype;
  std::int64_t rows, columns, stride, rank;
  const float* left;
  const float* right;
};

// Adds scale * left @ right to every weight, with keep_zeros only to its elements that are not zero. A weight is read
// once, the sum is float32 and is rounded once, and the weight is written once. The bytes of the result do not depend on the number of threads. Throws
// std::invalid_argument for invalid sizes.
void low_rank_update(const std::vector<LowRankUpdate>& updates, float scale, bool stochastic, bool keep_zeros,
                     std::uint64_t seed, int threads, const Simd& simd);

}  // namespace rocr
