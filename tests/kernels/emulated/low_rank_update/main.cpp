// Runs the low-rank update kernel on threads of the CPU. Arguments: a file with the weights, then the lefts, then the
// rights of all layers, which is overwritten with the updated weights; then layers, rows, columns, rank, stride, dtype
// (0 float32, 1 bfloat16, 2 float16), 1 if columns are a multiple of 8, 1 for stochastic rounding, the stride of left's
// ranks (1, or rows for transposed factors), the scale, the seed and the number of blocks.
#include "low_rank_update.cuh"

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

using namespace rocr;

namespace {

template <DType dtype>
void run(const UpdateArguments& arguments, bool aligned, bool stochastic) {
  if constexpr (dtype != DType::float32) {
    if (stochastic && aligned) return update_in_block<dtype, true, true>(arguments);
    if (stochastic) return update_in_block<dtype, false, true>(arguments);
  }
  aligned ? update_in_block<dtype, true, false>(arguments) : update_in_block<dtype, false, false>(arguments);
}

}  // namespace

int main(int, char** words) {
  const auto word = [&](int index) { return std::atoi(words[index]); };
  const int layers = word(2), rows = word(3), columns = word(4), rank = word(5), stride = word(6), dtype = word(7);
  const bool aligned = word(8), stochastic = word(9);
  std::ifstream input(words[1], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(input)), {});
  std::vector<std::max_align_t> memory(bytes.size() / sizeof(std::max_align_t) + 1);
  std::memcpy(memory.data(), bytes.data(), bytes.size());
  char* place = reinterpret_cast<char*>(memory.data());

  UpdateArguments arguments{};
  const std::size_t weight_bytes = static_cast<std::size_t>(rows) * stride * (dtype == 0 ? 4 : 2);
  for (int layer = 0; layer < layers; ++layer) {
    arguments.weights[layer] = place + layer * weight_bytes;
    arguments.lefts[layer] = reinterpret_cast<float*>(place + layers * weight_bytes) + layer * rows * rank;
    arguments.rights[layer] = arguments.lefts[0] + layers * rows * rank + layer * columns * rank;
    arguments.layers[layer] = layer;
  }
  arguments.stride = stride;
  const bool transposed = word(10) != 1;
  arguments.left_stride = transposed ? 1 : rank;
  arguments.left_rank_stride = transposed ? rows : 1;
  arguments.right_stride = transposed ? rank : 1;
  arguments.right_rank_stride = transposed ? 1 : columns;
  arguments.rows = rows;
  arguments.columns = columns;
  arguments.rank = rank;
  arguments.scale = static_cast<float>(std::atof(words[11]));
  arguments.seed = std::strtoull(words[12], nullptr, 10);
  const int blocks = word(13);
  const int tile_columns = (columns + update_columns - 1) / update_columns;
  arguments.items = layers * ((rows + update_rows - 1) / update_rows) * tile_columns;

  for (int index = 0; index < blocks; ++index) {
    Meeting meeting(update_threads);
    std::vector<float> own(update_shared_bytes / sizeof(float), NAN);
    block = &meeting;
    shared = &own;
    std::vector<std::thread> threads;
    for (int number_of_thread = 0; number_of_thread < update_threads; ++number_of_thread) {
      threads.emplace_back([&, number_of_thread] {
        threadIdx = {number_of_thread};
        blockIdx = {index};
        gridDim = {blocks};
        if (dtype == 0) run<DType::float32>(arguments, aligned, stochastic);
        if (dtype == 1) run<DType::bfloat16>(arguments, aligned, stochastic);
        if (dtype == 2) run<DType::float16>(arguments, aligned, stochastic);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  std::ofstream(words[1], std::ios::binary).write(place, static_cast<std::streamsize>(layers * weight_bytes));
  return 0;
}
