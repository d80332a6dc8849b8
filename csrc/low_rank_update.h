#pragma once

#include <vector>

#include "simd.h"

namespace rocr {

// One weight (rows, columns), its rows `stride` numbers apart, with left (rows, rank) and right (rank,
// columns).
struct LowRankUpdate {
  void* weight;
  Number number;
  std::int64_t rows, columns, stride, rank;
  const float* left;
  const float* right;
};

// Adds scale * left right to every weight: each is read once, added to in float32, rounded once and written
// once. The bytes of the result do not depend on the number of threads. Throws std::invalid_argument for
// sizes that cannot be.
void low_rank_update(const std::vector<LowRankUpdate>& updates, float scale, bool stochastic,
                     std::uint64_t seed, int threads, const Simd& simd);

}  // namespace rocr
