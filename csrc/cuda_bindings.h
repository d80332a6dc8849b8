#pragma once

#include <pybind11/pybind11.h>

// Adds the functions of cuda_kernels.h to the module. Defined if ROCR_WITH_CUDA is.
void bind_cuda(pybind11::module_& module);
