#pragma once

#include "simd.h"

namespace rocr {

// A weight (rows, columns) of elements of 1, 2 or 4 bytes, its rows `stride` elements apart, of which only the zeros
// matter. keys (columns, key_count), residuals (rows, key_count) and coefficients (rows, basis_size) are contiguous;
// the rows of basis (columns, basis_size) are basis_stride >= basis_size + line_floats apart, and can be read up to
// there.
struct SupportSolve {
  const void* weight;
  std::int64_t bytes, rows, columns, stride;
  const float* keys;
  std::int64_t key_count;
  const float* basis;
  std::int64_t basis_size, basis_stride;
  const float* residuals;
  double ridge;
  float* coefficients;
};

// Writes for each row z = Aᵀ (A Aᵀ + ridge I)⁻¹ r with A = keysᵀ D basis, where D selects the columns in which the
// weight is not zero. A is summed in float32, the systems are solved in float64. The bytes of the result do not depend
// on the number of threads. Returns false if a system is not positive definite in float64. Throws
// std::invalid_argument for invalid sizes.
bool solve_on_support(const SupportSolve& solve, int threads, const Simd& simd);

}  // namespace rocr
