// Launches the low-rank updates; low_rank_update.cuh is what their blocks do.
#include "low_rank_update.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace rocr {
namespace {

template <Number number, bool aligned, bool at_random>
__global__ void __launch_bounds__(update_threads, update_blocks)
    update(const __grid_constant__ UpdateArguments arguments) {
  update_in_block<number, aligned, at_random>(arguments);
}

template <Number number, bool aligned, bool at_random>
cudaError_t launch(const UpdateArguments& arguments, int processors, cudaStream_t stream) {
  const int blocks = std::min(arguments.items, update_blocks * processors);
  update<number, aligned, at_random><<<blocks, update_threads, update_shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <Number number>
cudaError_t launch(UpdateArguments& arguments, int layers, bool aligned, bool at_random, int processors,
                   cudaStream_t stream) {
  const std::int64_t tiles = (arguments.rows + update_rows - 1) / update_rows *
                             static_cast<std::int64_t>((arguments.columns + update_columns - 1) / update_columns);
  arguments.items = static_cast<int>(tiles * layers);
  if constexpr (number != Number::float32) {
    if (at_random && aligned) return launch<number, true, true>(arguments, processors, stream);
    if (at_random) return launch<number, false, true>(arguments, processors, stream);
  }
  return aligned ? launch<number, true, false>(arguments, processors, stream)
                 : launch<number, false, false>(arguments, processors, stream);
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

int cuda_low_rank_update(const std::vector<CudaLowRankUpdate>& updates, Number number, float scale, bool stochastic,
                         std::uint64_t seed, std::uintptr_t stream) {
  int device = 0, processors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
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
    switch (number) {
      case Number::float32:
        error = launch<Number::float32>(arguments, layers, aligned, false, processors, cuda_stream);
        break;
      case Number::bfloat16:
        error = launch<Number::bfloat16>(arguments, layers, aligned, stochastic, processors, cuda_stream);
        break;
      case Number::float16:
        error = launch<Number::float16>(arguments, layers, aligned, stochastic, processors, cuda_stream);
        break;
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace rocr
