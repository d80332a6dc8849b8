#pragma once

#include "simd.h"

namespace rocr {

// Adds the sum of k kᵀ over the rows k of keys (tokens, size) to the lower triangle of total (size, size). The
// upper triangle is neither read nor written. The strides are distances of rows, in elements. The bytes of the
// result do not depend on the number of threads. Throws std::invalid_argument for invalid sizes.
void accumulate_second_moment(float* total, std::int64_t total_stride, const void* keys,
                              std::int64_t keys_stride, std::int64_t tokens, std::int64_t size, DType dtype,
                              int threads, const Simd& simd);

// The same for groups of rows: rows offsets[g] to offsets[g + 1] are added to the total of group g, which begins
// g * group_stride floats after `totals`. Each total gets the bytes that accumulate_second_moment would give it.
void accumulate_grouped_second_moment(float* totals, std::int64_t group_stride, std::int64_t total_stride,
                                      const void* keys, std::int64_t keys_stride,
                                      const std::vector<std::int64_t>& offsets, std::int64_t size, DType dtype,
                                      int threads, const Simd& simd);

}  // namespace rocr
