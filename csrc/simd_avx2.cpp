#if defined(__x86_64__)
#include <immintrin.h>

#define ROCR_TARGET __attribute__((target("avx2,fma")))
#define ROCR_WIDTH 8
#define ROCR_TILE_ROWS 4
#define ROCR_TILE_VECTORS 3
#define ROCR_WIDEN(halves) \
  (Bits) _mm256_cvtepu16_epi32((__m128i)(halves))  // without it GCC emits three instructions
#define ROCR_WIDEN_BYTES(bytes) (Bits) _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)(bytes)))  // likewise
// One comparison looks for NaN in two vectors.
#define ROCR_ANY_NAN(first, second) _mm256_movemask_ps(_mm256_cmp_ps((__m256)(first), (__m256)(second), _CMP_UNORD_Q))
// The lower halves of the elements of two vectors, whose upper halves are zero, in order.
#define ROCR_NARROW_TWO(first, second) \
  _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)(first), (__m256i)(second)), 0xd8)
#include "simd_kernels.h"

namespace rocr {

static bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

extern const Simd avx2;
const Simd avx2 = {"avx2", is_supported, tile_rows, tile_columns, width, 192, multiply_first<tile_vectors>,
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
