// Keys in shared memory on sm_90a, and how wgmma is told of them. Quoted are sections of the PTX ISA.
#pragma once

#include <cstdint>

namespace rocr::sm90 {

// How the bulk copies leave an operand in shared memory: boxes of 64 columns (128 bytes, swizzled) by 64 tokens. Both
// operands, keysᵀ and keys, are read as stored, tokens by columns: they are MN-major ("Shared Memory Matrix Layout").
constexpr int box_columns = 64;
constexpr int box_tokens = 64;
constexpr std::uint32_t row_bytes = 128;                     // a token's 64 columns: the span of the swizzle
constexpr std::uint32_t box_bytes = box_tokens * row_bytes;  // the next 64 columns lie so far on
constexpr std::uint32_t group_bytes = 8 * row_bytes;         // the next 8 tokens lie so far on

// "Matrix Descriptor": bits 0-13 start, 16-29 leading dimension offset, 32-45 stride dimension offset, each in 16
// bytes; 49-51 base offset, 0 as boxes start at multiples of 1,024; 62-63 swizzle, 1 for 128 bytes. For a swizzled
// MN-major operand the leading dimension offset leads to the next 64 columns, the stride offset to the next 8 tokens.
__device__ inline std::uint64_t describe(std::uint32_t address) {
  return (address & 0x3FFFFu) >> 4 | std::uint64_t{box_bytes >> 4} << 16 | std::uint64_t{group_bytes >> 4} << 32 |
         std::uint64_t{1} << 62;
}

}  // namespace rocr::sm90
