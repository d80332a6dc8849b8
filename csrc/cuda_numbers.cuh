// Numbers on the device as they are stored, and as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace rocr {

template <Number number>
using Stored = std::conditional_t<number == Number::float32, float, std::uint16_t>;

template <Number number>
__device__ float to_float(Stored<number> stored) {
  if constexpr (number == Number::bfloat16) return __bfloat162float(__ushort_as_bfloat16(stored));
  if constexpr (number == Number::float16) return __half2float(__ushort_as_half(stored));
  if constexpr (number == Number::float32) return stored;
}

// Rounded to nearest, ties to even.
template <Number number>
__device__ Stored<number> from_float(float value) {
  if constexpr (number == Number::bfloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  if constexpr (number == Number::float16) return __half_as_ushort(__float2half_rn(value));
  if constexpr (number == Number::float32) return value;
}

// The shared memory that a launch asks for.
__device__ inline void* dynamic_shared() {
  extern __shared__ std::uint8_t bytes[];
  return bytes;
}

}  // namespace rocr
