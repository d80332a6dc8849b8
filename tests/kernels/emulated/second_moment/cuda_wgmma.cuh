// The functions of csrc/cuda_wgmma.cuh on the CPU: each thread computes its own part of the result. Products read
// shared memory by their descriptors, when the thread waits for them or, if `eager`, when they are committed.
#pragma once

#include "cuda_sm90.cuh"

namespace rocr::sm90 {

inline bool eager = false;

struct Product {
  float* d;
  std::uint64_t left, right;
  bool add;
};
inline thread_local std::vector<Product> issued;
inline thread_local std::deque<std::vector<Product>> committed;

// "Matrix Descriptor": the element at `index` along M or N, and at `token`, of an operand that is MN-major.
inline float element(std::uint64_t descriptor, int index, int token) {
  if (descriptor >> 62 != 1 || descriptor >> 49 & 7) fail("operands are swizzled by 128 bytes, at multiples of 1,024");
  const std::uint32_t start = (descriptor & 0x3FFF) << 4;
  const std::uint32_t leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  std::uint32_t address = start + index / 64 * leading + token / 8 * stride + token % 8 * 128 + index % 64 * 2;
  address ^= (address >> 7 & 7) << 4;
  std::uint16_t bits;
  std::memcpy(&bits, &block->memory.at(address - shared_window), 2);
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// "Matrix Fragments for wgmma.mma_async.m64nNk16": the 128 numbers of a thread.
inline void carry_out(const Product& product) {
  const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (int number = 0; number < 128; ++number) {
    float sum = product.add ? product.d[number] : 0;
    for (int token = 0; token < 16; ++token) {
      sum += element(product.left, row + number / 2 % 2 * 8, token) *
             element(product.right, number / 4 * 8 + column + number % 2, token);
    }
    product.d[number] = sum;
  }
}

inline void fence_products() {}
template <bool bfloat16>
void multiply(float (&d)[128], std::uint64_t left, std::uint64_t right, bool add) {
  issued.push_back({d, left, right, add});
}
inline void commit_products() {
  committed.push_back(std::move(issued));
  issued.clear();
  if (!eager) return;
  for (Product& product : committed.back()) carry_out(product);
  committed.back().clear();
}
template <int pending>
void wait_for_products() {
  while (committed.size() > pending) {
    for (const Product& product : committed.front()) carry_out(product);
    committed.pop_front();
  }
  block->warps[threadIdx.x / 32].meet();  // .aligned: the threads of a warp go on together
}

}  // namespace rocr::sm90
