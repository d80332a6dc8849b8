// Runs the second moment kernel of sm_90a on threads of the CPU and compares with float64. Arguments: width, tokens,
// layers, clusters, then the schedule (whole, splits, split_tokens, items), then 1 for eager products, then a seed.
#include "second_moment_sm90.cuh"

using namespace rocr;
using namespace rocr::sm90;

namespace {

void run_cluster(const Arguments& arguments, int index, int clusters, unsigned seed) {
  Cluster own(seed);
  std::vector<std::thread> threads;
  for (int number = 0; number < 2 * block_threads; ++number) {
    threads.emplace_back([&, number] {
      cluster = &own;
      block = &own.blocks[number / block_threads];
      threadIdx = {number % block_threads, 0};
      blockIdx = {2 * index + number / block_threads, 0};
      gridDim = {2 * clusters, 1};
      add_second_moments_in_block<true>(arguments);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void run_slices(const Arguments& arguments) {
  const CudaSchedule& schedule = arguments.schedule;
  for (int tile = 0; tile < (schedule.items - schedule.whole) / schedule.splits; ++tile) {
    for (int number = 0; number < 16 * tile_width; ++number) {
      threadIdx = {number % tile_width, 0};
      blockIdx = {tile, number / tile_width};
      gridDim = {tile, 16};
      add_slices_in_block(arguments);
    }
  }
}

// Numbers that arithmetic would change: -0.0, NaNs with payloads, infinity, denormals.
constexpr std::uint32_t left_alone[] = {0x80000000, 0x7fc12345, 0xffa54321, 0x7f800000, 0x00000123};

float from_bfloat16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

}  // namespace

int main(int, char** words) {
  const auto word = [&](int index) { return std::atoi(words[index]); };
  const int width = word(1), tokens = word(2), layers = word(3), clusters = word(4);
  eager = word(9);
  const unsigned seed = word(10);
  const int key_stride = width + 8, total_stride = width + 2;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Arguments arguments{};
  arguments.schedule = {word(5), word(6), word(7), word(8), clusters};
  arguments.total_stride = total_stride;
  arguments.tokens = tokens;
  arguments.width = width;
  arguments.block_rows = (width + tile_width - 1) / tile_width;
  std::vector<std::vector<std::uint16_t>> keys(layers);
  std::vector<std::vector<float>> totals(layers);
  for (int layer = 0; layer < layers; ++layer) {
    keys[layer].resize(static_cast<std::size_t>(tokens) * key_stride, 0x7FC0);
    for (int token = 0; token < tokens; ++token) {
      for (int column = 0; column < width; ++column) {
        const float value = normal(random);
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        keys[layer][token * key_stride + column] = bits >> 16;
      }
    }
    totals[layer].resize(static_cast<std::size_t>(width) * total_stride);
    for (std::size_t place = 0; place < totals[layer].size(); ++place) {
      std::memcpy(&totals[layer][place], &left_alone[place % std::size(left_alone)], 4);
    }
    for (int row = 0; row < width; ++row) {
      for (int column = 0; column <= row; ++column) totals[layer][row * total_stride + column] = normal(random);
    }
    arguments.keys[layer] = {keys[layer].data(), tokens, width, key_stride};
    arguments.totals[layer] = totals[layer].data();
  }
  const auto before = totals;
  std::vector<float> slices((arguments.schedule.items - arguments.schedule.whole + 1) * tile_width * tile_width);
  arguments.slices = slices.data();
  for (int index = 0; index < clusters; ++index) run_cluster(arguments, index, clusters, seed + index);
  run_slices(arguments);

  double difference = 0, norm = 0;
  for (int layer = 0; layer < layers; ++layer) {
    for (int row = 0; row < width; ++row) {
      for (int column = 0; column < total_stride; ++column) {
        const float result = totals[layer][row * total_stride + column];
        const float old = before[layer][row * total_stride + column];
        if (column > row) {
          if (std::memcmp(&result, &old, 4) != 0) fail("what lies above the diagonal was written to");
          continue;
        }
        double exact = old;
        for (int token = 0; token < tokens; ++token) {
          exact += static_cast<double>(from_bfloat16(keys[layer][token * key_stride + row])) *
                   from_bfloat16(keys[layer][token * key_stride + column]);
        }
        difference += (result - exact) * (result - exact);
        norm += exact * exact;
      }
    }
  }
  std::printf("%.3e\n", std::sqrt(difference / norm));
  return 0;
}
