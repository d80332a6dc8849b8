#define ROCR_TARGET
#define ROCR_WIDTH 4
#define ROCR_TILE_ROWS 4
#define ROCR_TILE_VECTORS 2
#include "simd_kernels.h"

namespace rocr {

static bool is_supported() { return true; }

extern const Simd plain;
const Simd plain = {"plain", is_supported, tile_rows, tile_columns, group_columns, 256, multiply, pack, add};

}  // namespace rocr
