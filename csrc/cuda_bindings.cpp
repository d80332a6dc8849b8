// Python bindings of the CUDA kernels. Without nvcc the module does not contain them.
#ifdef ROCR_WITH_CUDA

#include "cuda_bindings.h"

#include <pybind11/stl.h>

#include <tuple>

#include "cuda_kernels.h"

namespace py = pybind11;

namespace {

using Layer = std::tuple<std::uintptr_t, std::uintptr_t>;  // addresses of keys and total

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

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_error", &rocr::cuda_error, py::arg("code"));
  module.def("cuda_accumulate_second_moments", &accumulate_second_moments, py::arg("layers"), py::arg("dtype"),
             py::arg("tokens"), py::arg("width"), py::arg("key_stride"), py::arg("total_stride"), py::arg("whole"),
             py::arg("splits"), py::arg("split_tokens"), py::arg("items"), py::arg("clusters"), py::arg("slices"),
             py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

#endif
