// Conversions on the device between stored elements of every dtype and float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace rocr {

template <DType dtype>
using Stored = std::conditional_t<dtype == DType::float32, float, std::uint16_t>;

template <DType dtype>
__device__ float to_float(Stored<dtype> stored) {
  if constexpr (dtype == DType::bfloat16) return __bfloat162float(__ushort_as_bfloat16(stored));
  if constexpr (dtype == DType::float16) return __half2float(__ushort_as_half(stored));
  if constexpr (dtype == DType::float32) return stored;
}

// Rounds to nearest, ties to even.
template <DType dtype>
__device__ Stored<dtype> from_float(float value) {
  if constexpr (dtype == DType::bfloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  if constexpr (dtype == DType::float16) return __half_as_ushort(__float2half_rn(value));
  if constexpr (dtype == DType::float32) return value;
}

// The dynamic shared memory of a block.
__device__ inline void* dynamic_shared() {
  extern __shared__ std::uint8_t bytes[];
  return bytes;
}

}  // namespace rocr
