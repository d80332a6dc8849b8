#if defined(__aarch64__)
#define ROCR_TARGET
#define ROCR_WIDTH 4
#define ROCR_TILE_ROWS 4
#define ROCR_TILE_VECTORS 6
#include "simd_kernels.h"

namespace rocr {

static bool is_supported() { return true; }

extern const Simd neon;
const Simd neon = {"neon", is_supported, tile_rows, tile_columns, width, 256, multiply_first<tile_vectors>,
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
