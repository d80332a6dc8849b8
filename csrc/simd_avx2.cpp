#if defined(__x86_64__)
#define ROCR_TARGET __attribute__((target("avx2,fma")))
#define ROCR_WIDTH 8
#define ROCR_TILE_ROWS 6
#define ROCR_TILE_VECTORS 2
#include "simd_kernels.h"

namespace rocr {

static bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

extern const Simd avx2;
const Simd avx2 = {"avx2", is_supported, tile_rows, tile_columns, group_columns, 256, multiply, pack, add};

}  // namespace rocr
#endif
