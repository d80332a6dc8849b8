// The second moment of float32 keys on Intel AMX.
#pragma once

#include <cstdint>

namespace rocr {

// Whether the processor multiplies 8-bit integers in its tile registers (AMX-INT8).
bool multiplies_digits();

// accumulate_second_moment for float32 keys, with checked sizes above zero.
void second_moment_by_digits(float* total, std::int64_t total_stride, const float* keys,
                             std::int64_t keys_stride, std::int64_t tokens, std::int64_t size, int threads);

}  // namespace rocr
