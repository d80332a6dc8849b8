// Stochastic rounding. An element gets the same random bits as from random_bits of kernels/_common.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace rocr {

struct Words {
  std::uint32_t word[4];
};

// Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
__device__ inline Words philox(std::uint64_t seed, std::uint32_t first, std::uint32_t second) {
  std::uint32_t counter[4] = {first, second, 0, 0};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t left = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t right = std::uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = static_cast<std::uint32_t>(right >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<std::uint32_t>(right);
    counter[2] = static_cast<std::uint32_t>(left >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<std::uint32_t>(left);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return {{counter[0], counter[1], counter[2], counter[3]}};
}

// 16 random bits for element `index` of the eight that share a draw.
__device__ inline std::uint32_t bits_of(const Words& words, int index) {
  return words.word[(index >> 2) + (index & 2)] >> (index & 1) * 16 & 0xFFFF;
}

// One of the two 16-bit neighbours of value, with the expectation of value, as float, which holds both exactly.
template <DType dtype>
__device__ inline float round_stochastic(float value, std::uint32_t bits) {
  if (!(fabsf(value) < INFINITY)) return value;
  if (dtype == DType::float16 && fabsf(value) < 6.103515625e-5f) {
    // Below 2^-14 the spacing of float16 is 2^-24.
    const float scaled = value * 16777216.0f;
    const float below = floorf(scaled);
    const float up = (scaled - below) * 65536.0f > static_cast<float>(bits) ? 1.0f : 0.0f;
    return (below + up) * 5.9604644775390625e-8f;
  }
  std::uint32_t pattern;
  std::memcpy(&pattern, &value, 4);
  pattern = dtype == DType::bfloat16 ? (pattern + bits) & 0xFFFF0000 : (pattern + (bits >> 3)) & 0xFFFFE000;
  std::memcpy(&value, &pattern, 4);
  return value;
}

}  // namespace rocr
