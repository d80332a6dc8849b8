#pragma once

#include "simd.h"

namespace rocr {

// output += inputs * weightᵀ, with weight (rows, columns), inputs (count, columns) and output (count, rows), all of
// `dtype` and with unit stride along a row; their rows are weight_stride, inputs_stride and `rows` elements apart.
struct WideProduct {
  const void* weight;
  const void* inputs;
  void* output;
  DType dtype;
  std::int64_t rows, columns, count;
  std::int64_t weight_stride, inputs_stride;
};

// Computes a product in float32 and rounds each element of the result once, to nearest. The bytes of the result do not
// depend on the number of threads. Throws std::invalid_argument for invalid sizes.
void wide_product(const WideProduct& product, int threads, const Simd& simd);

}  // namespace rocr
