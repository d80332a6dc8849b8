// The Python module rocr._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_bindings.h"
#include "low_rank_update.h"
#include "second_moment.h"
#include "support_solve.h"
#include "wide_product.h"

namespace py = pybind11;

namespace {

template <class Pointer>
Pointer pointer(std::uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

void accumulate_second_moment(std::uintptr_t total, std::int64_t total_stride, std::uintptr_t keys,
                              std::int64_t keys_stride, std::int64_t tokens, std::int64_t size,
                              rocr::DType dtype, int threads, const std::string& simd) {
  rocr::accumulate_second_moment(pointer<float*>(total), total_stride, pointer<const void*>(keys),
                                 keys_stride, tokens, size, dtype, threads, rocr::find_simd(simd));
}

void accumulate_grouped_second_moment(std::uintptr_t totals, std::int64_t group_stride,
                                      std::int64_t total_stride, std::uintptr_t keys, std::int64_t keys_stride,
                                      const std::vector<std::int64_t>& offsets, std::int64_t size,
                                      rocr::DType dtype, int threads, const std::string& simd) {
  rocr::accumulate_grouped_second_moment(pointer<float*>(totals), group_stride, total_stride,
                                         pointer<const void*>(keys), keys_stride, offsets, size, dtype, threads,
                                         rocr::find_simd(simd));
}

rocr::LowRankUpdate make_update(std::uintptr_t weight, rocr::DType dtype, std::int64_t rows,
                                std::int64_t columns, std::int64_t stride, std::int64_t rank,
                                std::uintptr_t left, std::uintptr_t right) {
  return {pointer<void*>(weight),      dtype, rows, columns, stride, rank, pointer<const float*>(left),
          pointer<const float*>(right)};
}

void low_rank_update(const std::vector<rocr::LowRankUpdate>& updates, float scale, bool stochastic,
                     std::uint64_t seed, int threads, const std::string& simd, bool keep_zeros) {
  rocr::low_rank_update(updates, scale, stochastic, keep_zeros, seed, threads, rocr::find_simd(simd));
}

bool solve_on_support(std::uintptr_t weight, std::int64_t bytes, std::int64_t rows, std::int64_t columns,
                      std::int64_t stride, std::uintptr_t keys, std::int64_t key_count, std::uintptr_t basis,
                      std::int64_t basis_size, std::int64_t basis_stride, std::uintptr_t residuals, double ridge,
                      std::uintptr_t coefficients, int threads, const std::string& simd) {
  return rocr::solve_on_support(
      {pointer<const void*>(weight), bytes, rows, columns, stride, pointer<const float*>(keys), key_count,
       pointer<const float*>(basis), basis_size, basis_stride, pointer<const float*>(residuals), ridge,
       pointer<float*>(coefficients)},
      threads, rocr::find_simd(simd));
}

void wide_product(std::uintptr_t weight, std::uintptr_t inputs, std::uintptr_t output, rocr::DType dtype,
                  std::int64_t rows, std::int64_t columns, std::int64_t count, std::int64_t weight_stride,
                  std::int64_t inputs_stride, int threads, const std::string& simd) {
  rocr::wide_product({pointer<const void*>(weight), pointer<const void*>(inputs), pointer<void*>(output), dtype, rows,
                      columns, count, weight_stride, inputs_stride},
                     threads, rocr::find_simd(simd));
}

std::vector<std::string> simd_names() {
  std::vector<std::string> names;
  for (const rocr::Simd* simd : rocr::supported_simds()) names.emplace_back(simd->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of rocr.ops. Addresses are integers; sizes and strides count elements.";
  py::enum_<rocr::DType>(module, "DType")
      .value("float32", rocr::DType::float32)
      .value("bfloat16", rocr::DType::bfloat16)
      .value("float16", rocr::DType::float16);
  py::class_<rocr::LowRankUpdate>(module, "LowRankUpdate")
      .def(py::init(&make_update), py::arg("weight"), py::arg("dtype"), py::arg("rows"), py::arg("columns"),
           py::arg("stride"), py::arg("rank"), py::arg("left"), py::arg("right"));
  module.def("simd_names", &simd_names, "Instruction sets that this machine can run, the fastest first.");
  module.def("accumulate_second_moment", &accumulate_second_moment, py::arg("total"), py::arg("total_stride"),
             py::arg("keys"), py::arg("keys_stride"), py::arg("tokens"), py::arg("size"), py::arg("dtype"),
             py::arg("threads"), py::arg("simd") = "", py::call_guard<py::gil_scoped_release>());
  module.def("accumulate_grouped_second_moment", &accumulate_grouped_second_moment, py::arg("totals"),
             py::arg("group_stride"), py::arg("total_stride"), py::arg("keys"), py::arg("keys_stride"),
             py::arg("offsets"), py::arg("size"), py::arg("dtype"), py::arg("threads"), py::arg("simd") = "",
             py::call_guard<py::gil_scoped_release>());
  module.def("low_rank_update", &low_rank_update, py::arg("updates"), py::arg("scale"), py::arg("stochastic"),
             py::arg("seed"), py::arg("threads"), py::arg("simd") = "", py::arg("keep_zeros") = false,
             py::call_guard<py::gil_scoped_release>());
  module.def("solve_on_support", &solve_on_support, py::arg("weight"), py::arg("bytes"), py::arg("rows"),
             py::arg("columns"), py::arg("stride"), py::arg("keys"), py::arg("key_count"), py::arg("basis"),
             py::arg("basis_size"), py::arg("basis_stride"), py::arg("residuals"), py::arg("ridge"),
             py::arg("coefficients"), py::arg("threads"), py::arg("simd") = "",
             py::call_guard<py::gil_scoped_release>());
  module.def("wide_product", &wide_product, py::arg("weight"), py::arg("inputs"), py::arg("output"), py::arg("dtype"),
             py::arg("rows"), py::arg("columns"), py::arg("count"), py::arg("weight_stride"), py::arg("inputs_stride"),
             py::arg("threads"), py::arg("simd") = "", py::call_guard<py::gil_scoped_release>());
#ifdef ROCR_WITH_CUDA
  bind_cuda(module);
#endif
}
