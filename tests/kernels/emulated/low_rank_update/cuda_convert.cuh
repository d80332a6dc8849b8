// The functions of csrc/cuda_convert.cuh on the CPU, and the CUDA names that the kernel uses.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "meeting.h"
#include "simd.h"

struct Coordinates {
  int x;
};
inline thread_local Coordinates threadIdx, blockIdx, gridDim;
inline Meeting* block;
inline std::vector<float>* shared;
inline void __syncthreads() { block->meet(); }

namespace rocr {

template <DType dtype>
using Stored = std::conditional_t<dtype == DType::float32, float, std::uint16_t>;

template <DType dtype>
float to_float(Stored<dtype> stored) {
  if constexpr (dtype == DType::float32) return stored;
  if constexpr (dtype == DType::float16) {
    _Float16 half;
    std::memcpy(&half, &stored, 2);
    return half;
  }
  const std::uint32_t wide = static_cast<std::uint32_t>(stored) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

template <DType dtype>
Stored<dtype> from_float(float value) {
  if constexpr (dtype == DType::float32) return value;
  std::uint16_t stored;
  if constexpr (dtype == DType::float16) {
    const auto half = static_cast<_Float16>(value);
    std::memcpy(&stored, &half, 2);
    return stored;
  }
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void* dynamic_shared() { return shared->data(); }

}  // namespace rocr
