#if defined(__x86_64__)
#include <immintrin.h>

#define ROCR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define ROCR_WIDTH 16
#define ROCR_TILE_ROWS 8
#define ROCR_TILE_VECTORS 3
#define ROCR_WIDEN(halves) \
  (Bits) _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)(halves))  // without it GCC emits three instructions
#define ROCR_WIDEN_BYTES(bytes) (Bits) _mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)(bytes))  // likewise
#include "simd_kernels.h"

namespace rocr {

static bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

extern const Simd avx512;
const Simd avx512 = {"avx512", is_supported, tile_rows, tile_columns, width, 512, multiply_first<tile_vectors>,
                     pack,
                     add,
                     multiply_support_first<tile_vectors>,
                     multiply_one_vector,
                     multiply_few,
                     widen_row,
                     find_support,
                     multiply_pairs};

}  // namespace rocr
#endif
