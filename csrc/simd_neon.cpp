#if defined(__aarch64__)
#define ROCR_TARGET
#define ROCR_WIDTH 4
#define ROCR_TILE_ROWS 12
#define ROCR_TILE_VECTORS 2
#include "simd_kernels.h"

namespace rocr {

static bool is_supported() { return true; }

extern const Simd neon;
const Simd neon = {"neon", is_supported, tile_rows, tile_columns, group_columns, 256, multiply, pack, add};

}  // namespace rocr
#endif
