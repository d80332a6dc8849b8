// Launches of the low-rank update. low_rank_update.cuh is the code of a block.
#include "low_rank_update.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace rocr {
namespace {

template <DType dtype, bool aligned, bool stochastic>
__global__ void __launch_bounds__(update_threads, update_blocks)
    update(const __grid_constant__ UpdateArguments arguments) {
  update_in_block<dtype, aligned, stochastic>(arguments);
}

template <DType dtype, bool aligned, bool stochastic>
cudaError_t launch(const UpdateArguments& arguments, int multiprocessors, cudaStream_t stream) {
  const int blocks = std::min(arguments.items, update_blocks * multiprocessors);
  update<dtype, aligned, stochastic><<<blocks, update_threads, update_shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <DType dtype>
cudaError_t launch(UpdateArguments& arguments, int layers, bool aligned, bool stochastic, int multiprocessors,
                   cudaStream_t stream) {
  const std::int64_t tiles = (arguments.rows + update_rows - 1) / update_rows *
                             static_cast<std::int64_t>((arguments.columns + update_columns - 1) / update_columns);
  arguments.items = static_cast<int>(tiles * layers);
  if constexpr (dtype != DType::float32) {
    if (stochastic && aligned) return launch<dtype, true, true>(arguments, multiprocessors, stream);
    if (stochastic) return launch<dtype, false, true>(arguments, multiprocessors, stream);
  }
  return aligned ? launch<dtype, true, false>(arguments, multiprocessors, stream)
                 : launch<dtype, false, false>(arguments, multiprocessors, stream);
}

bool is_alike(const CudaLowRankUpdate& one, const CudaLowRankUpdate& other) {
  return one.rows == other.rows && one.columns == other.columns && one.stride == other.stride &&
         one.rank == other.rank && one.left_stride == other.left_stride &&
         one.left_rank_stride == other.left_rank_stride && one.right_stride == other.right_stride &&
         one.right_rank_stride == other.right_rank_stride;
}

UpdateArguments arguments_of(const CudaLowRankUpdate& update, float scale, std::uint64_t seed) {
  UpdateArguments arguments{};
  arguments.stride = update.stride;
  arguments.left_stride = update.left_stride;
  arguments.left_rank_stride = update.left_rank_stride;
  arguments.right_stride = update.right_stride;
  arguments.right_rank_stride = update.right_rank_stride;
  arguments.rows = static_cast<int>(update.rows);
  arguments.columns = static_cast<int>(update.columns);
  arguments.rank = static_cast<int>(update.rank);
  arguments.scale = scale;
  arguments.seed = seed;
  return arguments;
}

}  // namespace

int cuda_low_rank_update(const std::vector<CudaLowRankUpdate>& updates, DType dtype, float scale, bool stochastic,
                         std::uint64_t seed, std::uintptr_t stream) {
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess) {
    return error;
  }
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  for (std::size_t first = 0, next; first < updates.size(); first = next) {
    UpdateArguments arguments = arguments_of(updates[first], scale, seed);
    bool aligned = updates[first].columns % 8 == 0 && updates[first].stride % 8 == 0;
    for (next = first; next < updates.size() && next - first < maximum_updates; ++next) {
      const CudaLowRankUpdate& update = updates[next];
      if (!is_alike(update, updates[first])) break;
      arguments.weights[next - first] = update.weight;
      arguments.lefts[next - first] = update.left;
      arguments.rights[next - first] = update.right;
      arguments.layers[next - first] = update.layer;
      aligned = aligned && reinterpret_cast<std::uintptr_t>(update.weight) % 16 == 0;
    }
    const int layers = static_cast<int>(next - first);
    cudaError_t error = cudaSuccess;
    switch (dtype) {
      case DType::float32:
        error = launch<DType::float32>(arguments, layers, aligned, false, multiprocessors, cuda_stream);
        break;
      case DType::bfloat16:
        error = launch<DType::bfloat16>(arguments, layers, aligned, stochastic, multiprocessors, cuda_stream);
        break;
      case DType::float16:
        error = launch<DType::float16>(arguments, layers, aligned, stochastic, multiprocessors, cuda_stream);
        break;
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace rocr
