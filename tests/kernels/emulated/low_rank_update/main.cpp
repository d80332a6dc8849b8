// Runs the low-rank update kernel on threads of the CPU. Arguments: a file with the weights, then the lefts, then the
// rights of all layers, to be overwritten with the updated weights; then layers, rows, columns, rank, stride, number (0
// float32, 1 bfloat16, 2 float16), 1 where rows are whole eights, 1 for rounding at random, the stride of left's ranks
// (1, or rows for factors that lie transposed), the scale, the seed and the blocks.
#include "low_rank_update.cuh"

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

using namespace rocr;

namespace {

template <Number number>
void run(const UpdateArguments& arguments, bool aligned, bool at_random) {
  if constexpr (number != Number::float32) {
    if (at_random && aligned) return update_in_block<number, true, true>(arguments);
    if (at_random) return update_in_block<number, false, true>(arguments);
  }
  aligned ? update_in_block<number, true, false>(arguments) : update_in_block<number, false, false>(arguments);
}

}  // namespace

int main(int, char** words) {
  const auto word = [&](int index) { return std::atoi(words[index]); };
  const int layers = word(2), rows = word(3), columns = word(4), rank = word(5), stride = word(6), number = word(7);
  const bool aligned = word(8), at_random = word(9);
  std::ifstream input(words[1], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(input)), {});
  std::vector<std::max_align_t> memory(bytes.size() / sizeof(std::max_align_t) + 1);
  std::memcpy(memory.data(), bytes.data(), bytes.size());
  char* place = reinterpret_cast<char*>(memory.data());

  UpdateArguments arguments{};
  const std::size_t weight_bytes = static_cast<std::size_t>(rows) * stride * (number == 0 ? 4 : 2);
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
        if (number == 0) run<Number::float32>(arguments, aligned, at_random);
        if (number == 1) run<Number::bfloat16>(arguments, aligned, at_random);
        if (number == 2) run<Number::float16>(arguments, aligned, at_random);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  std::ofstream(words[1], std::ios::binary).write(place, static_cast<std::streamsize>(layers * weight_bytes));
  return 0;
}
