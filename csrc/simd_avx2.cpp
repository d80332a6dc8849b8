#if defined(__x86_64__)
#include <immintrin.h>

#define ROCR_TARGET __attribute__((target("avx2,fma")))
#define ROCR_WIDTH 8
#define ROCR_TILE_ROWS 4
#define ROCR_TILE_VECTORS 3
#define ROCR_WIDEN(halves) \
  (Bits) _mm256_cvtepu16_epi32((__m128i)(halves))  // without it GCC emits three instructions
#define ROCR_WIDEN_BYTES(bytes) (Bits) _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)(bytes)))  // likewise
#include "simd_kernels.h"

namespace rocr {

static bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

extern const Simd avx2;
const Simd avx2 = {"avx2", is_supported, tile_rows, tile_columns, 192, multiply_first<tile_vectors>,
                   pack,
                   add,
                   multiply_support_first<tile_vectors>,
                   find_support,
                   multiply_pairs};

}  // namespace rocr
#endif
