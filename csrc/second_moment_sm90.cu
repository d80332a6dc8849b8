// Launches of the second moment of sm_90a. second_moment_sm90.cuh is the code of a block.
#include "second_moment_sm90.cuh"

#include <cuda.h>
#include <cuda_runtime.h>

namespace rocr {
namespace {

using namespace sm90;

template <bool bfloat16>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(block_threads, 1)
    add_second_moments(const __grid_constant__ Arguments arguments) {
  add_second_moments_in_block<bfloat16>(arguments);
}

__global__ void add_slices(const __grid_constant__ Arguments arguments) { add_slices_in_block(arguments); }

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Finds the driver's function at run time: the module does not link libcuda, so it loads without a driver.
cudaError_t find_encode(EncodeTiled* encode) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, 0, &found);
#else
  cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, 0, &found);
#endif
  if (error == cudaSuccess && found != cudaDriverEntryPointSuccess) error = cudaErrorNotSupported;
  *encode = reinterpret_cast<EncodeTiled>(address);
  return error;
}

// Describes keys (tokens, width) as boxes of 64 tokens by 64 columns, swizzled as wgmma reads them.
CUresult describe_keys(EncodeTiled encode, const CudaKeys& keys, const void* address, CUtensorMap* map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(keys.width), static_cast<cuuint64_t>(keys.tokens)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(keys.key_stride) * 2};
  const cuuint32_t box[] = {box_columns, box_tokens};
  const cuuint32_t steps[] = {1, 1};
  const auto type =
      keys.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 2, const_cast<void*>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <bool bfloat16>
cudaError_t launch(const Arguments& arguments, cudaStream_t stream) {
  const CudaSchedule& schedule = arguments.schedule;
  const cudaError_t error = cudaFuncSetAttribute(
      add_second_moments<bfloat16>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  add_second_moments<bfloat16><<<2 * schedule.clusters, block_threads, shared_bytes, stream>>>(arguments);
  if (schedule.items > schedule.whole) {
    const int tiles = (schedule.items - schedule.whole) / schedule.splits;
    add_slices<<<dim3(tiles, 16), tile_width, 0, stream>>>(arguments);
  }
  return cudaGetLastError();
}

}  // namespace

int cuda_accumulate_second_moments(const std::vector<CudaSecondMoment>& layers, const CudaKeys& keys,
                                   const CudaSchedule& schedule, float* slices, std::uintptr_t stream) {
  if (layers.empty() || layers.size() > cuda_maximum_layers || keys.dtype == DType::float32) {
    return cudaErrorInvalidValue;
  }
  EncodeTiled encode = nullptr;
  if (const cudaError_t error = find_encode(&encode); error != cudaSuccess) return error;
  Arguments arguments{};
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const CUresult result = describe_keys(encode, keys, layers[layer].keys, &arguments.keys[layer]);
    if (result != CUDA_SUCCESS) return -static_cast<int>(result);
    arguments.totals[layer] = layers[layer].total;
  }
  arguments.slices = slices;
  arguments.total_stride = keys.total_stride;
  arguments.tokens = static_cast<int>(keys.tokens);
  arguments.width = static_cast<int>(keys.width);
  arguments.block_rows = static_cast<int>((keys.width + tile_width - 1) / tile_width);
  arguments.schedule = schedule;
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  return keys.dtype == DType::bfloat16 ? launch<true>(arguments, cuda_stream) : launch<false>(arguments, cuda_stream);
}

std::string cuda_error(int code) {
  if (code < 0) return "cuTensorMapEncodeTiled failed with CUresult " + std::to_string(-code);
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace rocr
