// The second moment of float32 keys on Intel AMX.
#pragma once

#include <cstdint>
#include <memory>

#include "moment_kernel.h"

namespace rocr {

// Whether the processor multiplies 8-bit integers in its tile registers (AMX-INT8).
bool multiplies_digits();

std::unique_ptr<const MomentKernel> make_digits_kernel(std::int64_t size);

}  // namespace rocr
