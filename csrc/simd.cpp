// The list of instruction sets, and the choice among them at run time.
#include "simd.h"

#include <stdexcept>

namespace rocr {

#if defined(__x86_64__)
extern const Simd amx, avx512, avx2;
#elif defined(__aarch64__)
extern const Simd neon;
#endif
extern const Simd plain;

std::int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

static std::vector<const Simd*> find_supported() {
  std::vector<const Simd*> supported;
#if defined(__x86_64__)
  const Simd* all[] = {&amx, &avx512, &avx2, &plain};
#elif defined(__aarch64__)
  const Simd* all[] = {&neon, &plain};
#else
  const Simd* all[] = {&plain};
#endif
  for (const Simd* simd : all)
    if (simd->is_supported()) supported.push_back(simd);
  return supported;
}

const std::vector<const Simd*>& supported_simds() {
  static const std::vector<const Simd*> supported = find_supported();
  return supported;
}

const Simd& find_simd(const std::string& name) {
  std::string names;
  for (const Simd* simd : supported_simds()) {
    if (name.empty() || name == simd->name) return *simd;
    names += names.empty() ? simd->name : std::string(", ") + simd->name;
  }
  throw std::invalid_argument("There is no instruction set '" + name + "' here; there are " + names + ".");
}

}  // namespace rocr
