// Python bindings of the CUDA kernels. Without nvcc the module does not contain them.
#ifdef ROCR_WITH_CUDA

#include "cuda_bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cuda_kernels.h"

namespace py = pybind11;

namespace {

using Layer = std::tuple<std::uintptr_t, std::uintptr_t>;  // addresses of keys and total
using Update = std::array<std::uint64_t, 12>;              // the fields of CudaLowRankUpdate, in order

int accumulate_second_moments(const std::vector<Layer>& layers, rocr::DType dtype, std::int64_t tokens,
                              std::int64_t width, std::int64_t key_stride, std::int64_t total_stride,
                              std::int32_t whole, std::int32_t splits, std::int32_t split_tokens, std::int32_t items,
                              std::int32_t clusters, std::uintptr_t slices, std::uintptr_t stream) {
  std::vector<rocr::CudaSecondMoment> operands;
  for (const auto& [keys, total] : layers) {
    operands.push_back({reinterpret_cast<const void*>(keys), reinterpret_cast<float*>(total)});
  }
  return rocr::cuda_accumulate_second_moments(operands, {dtype, tokens, width, key_stride, total_stride},
                                              {whole, splits, split_tokens, items, clusters},
                                              reinterpret_cast<float*>(slices), stream);
}

rocr::CudaLowRankUpdate make_update(const Update& fields) {
  const auto number = [&](int index) { return static_cast<std::int64_t>(fields[index]); };
  return {reinterpret_cast<void*>(fields[0]),
          reinterpret_cast<const float*>(fields[1]),
          reinterpret_cast<const float*>(fields[2]),
          number(3),
          number(4),
          number(5),
          number(6),
          number(7),
          number(8),
          number(9),
          number(10),
          static_cast<std::uint32_t>(fields[11])};
}

int low_rank_update(const std::vector<Update>& updates, rocr::DType dtype, float scale, bool stochastic,
                    std::uint64_t seed, std::uintptr_t stream) {
  std::vector<rocr::CudaLowRankUpdate> operands;
  for (const Update& update : updates) operands.push_back(make_update(update));
  return rocr::cuda_low_rank_update(operands, dtype, scale, stochastic, seed, stream);
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_error", &rocr::cuda_error, py::arg("code"));
  module.def("cuda_accumulate_second_moments", &accumulate_second_moments, py::arg("layers"), py::arg("dtype"),
             py::arg("tokens"), py::arg("width"), py::arg("key_stride"), py::arg("total_stride"), py::arg("whole"),
             py::arg("splits"), py::arg("split_tokens"), py::arg("items"), py::arg("clusters"), py::arg("slices"),
             py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def("cuda_low_rank_update", &low_rank_update, py::arg("updates"), py::arg("dtype"), py::arg("scale"),
             py::arg("stochastic"), py::arg("seed"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

#endif
