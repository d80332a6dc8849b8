// The layout of keys in shared memory on sm_90a, and its wgmma descriptor. Names in quotes are sections of the PTX ISA.
#pragma once

#include <cstdint>

namespace rocr::sm90 {

// Bulk copies store an operand in boxes of 64 columns (128 bytes, swizzled) by 64 tokens. Both operands, keysᵀ and
// keys, are read as they are stored, tokens by columns: they are MN-major ("Shared Memory Matrix Layout").
constexpr int box_columns = 64;
constexpr int box_tokens = 64;
constexpr std::uint32_t row_bytes = 128;                     // 64 columns of a token: the span of the swizzle
constexpr std::uint32_t box_bytes = box_tokens * row_bytes;  // distance of the next 64 columns
constexpr std::uint32_t group_bytes = 8 * row_bytes;         // distance of the next 8 tokens

// "Matrix Descriptor": bits 0-13 start address, 16-29 leading dimension offset, 32-45 stride dimension offset, each in
// units of 16 bytes; 49-51 base offset, 0 because boxes start at multiples of 1,024; 62-63 swizzle, 1 for 128 bytes.
// For a swizzled MN-major operand the leading dimension offset is the distance of the next 64 columns, the stride
// dimension offset that of the next 8 tokens.
__device__ inline std::uint64_t describe(std::uint32_t address) {
  return (address & 0x3FFFFu) >> 4 | std::uint64_t{box_bytes >> 4} << 16 | std::uint64_t{group_bytes >> 4} << 32 |
         std::uint64_t{1} << 62;
}

}  // namespace rocr::sm90
