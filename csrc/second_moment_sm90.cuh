// Second moments on sm_90a. A cluster of two thread blocks computes a 256 x 256 tile of a total, 128 rows each. One
// thread of a block copies keys to shared memory, and two warpgroups multiply them. Both blocks need the same 256
// columns: each block copies half of them to both.
//
// barrier       arrivals of one phase                                       who waits
// full[stage]   the copying thread, and 48 KiB from both blocks             the warpgroups, before they multiply
// empty[stage]  each warp of the warpgroups of both blocks, after it reads  the copying thread, before it copies
//
// `empty` has arrivals from both blocks because a copy writes to both. Bytes of the other block may arrive before this
// block announces its own. The phase of `full` cannot end before the announcement, which is its only arrival. Nor can
// those bytes arrive one phase early: the other block's copies wait for this block's warps, which wait for `full`.
#pragma once

#include "cuda_boxes.cuh"
#include "cuda_kernels.h"
#include "cuda_sm90.cuh"
#include "cuda_triangle.cuh"
#include "cuda_wgmma.cuh"

namespace rocr::sm90 {

constexpr int tile_width = static_cast<int>(cuda_tile_width);
constexpr int tile_boxes = tile_width / box_columns;
constexpr int row_boxes = tile_boxes / 2;  // boxes of the 128 rows of a block
constexpr int stages = 4;
constexpr std::uint32_t columns_offset = row_boxes * box_bytes;  // in a stage, after the boxes of the rows
constexpr std::uint32_t stage_bytes = (row_boxes + tile_boxes) * box_bytes;
constexpr int chunk_tokens = 8192;  // most tokens of one accumulator: tensor cores truncate their sums
constexpr int multiplying_warps = 8;
constexpr int block_threads = 128 + 32 * multiplying_warps;
// Stages, two barriers for each, and padding for a start at a multiple of 1,024.
constexpr std::size_t shared_bytes = stages * (stage_bytes + 2 * sizeof(std::uint64_t)) + 1024;

struct Arguments {
  CUtensorMap keys[cuda_maximum_layers];
  float* totals[cuda_maximum_layers];
  float* slices;
  std::int64_t total_stride;
  int tokens, width, block_rows;
  CudaSchedule schedule;
};

// A position in the ring of stages. The copying thread and the warpgroups advance through it in the same order.
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

__device__ void copy_keys(const Arguments& arguments, std::uint32_t shared, std::uint32_t full, std::uint32_t empty) {
  const int rank = static_cast<int>(rank_in_cluster());
  Ring ring;
  for (int item = blockIdx.x / 2; item < arguments.schedule.items; item += gridDim.x / 2) {
    const Share share = share_of(item, arguments.schedule, arguments.block_rows, arguments.tokens);
    const CUtensorMap& keys = arguments.keys[share.layer];
    const int row = share.block_row * tile_width + rank * row_boxes * box_columns;
    const int column = share.block_column * tile_width;
    for (int token = share.start; token < share.end; token += box_tokens) {
      const std::uint32_t stage = shared + ring.stage * stage_bytes;
      const std::uint32_t filled = full + ring.stage * sizeof(std::uint64_t);
      wait_for(empty + ring.stage * sizeof(std::uint64_t), ring.parity ^ 1);
      arrive_expecting(filled, stage_bytes);
      for (int box = 0; box < row_boxes; ++box) {
        load_box(stage + box * box_bytes, keys, row + box * box_columns, token, filled);
      }
      for (int half = 0; half < tile_boxes / 2; ++half) {
        const int box = rank * (tile_boxes / 2) + half;
        load_box_everywhere(stage + columns_offset + box * box_bytes, keys, column + box * box_columns, token, filled,
                            0b11);
      }
      ring.advance();
    }
  }
}

// Adds the 64 x 256 accumulator of a warpgroup to memory, except above the diagonal and outside the total.
__device__ void add_accumulator(const float (&d)[128], float* target, std::int64_t stride, int row, int column,
                                int width) {
  // Of the 16 rows of its warp, lane t holds, for each 8 columns, two columns of row t / 4 and of row t / 4 + 8.
  const int thread = threadIdx.x % 128;
  const int own_row = thread / 32 * 16 + thread % 32 / 4;
  const int own_column = thread % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int local_row = own_row + 8 * half;
    const int below = row + local_row - column - own_column;  // columns at or left of the diagonal
    float* place = target + local_row * stride + own_column;
    if (row + local_row >= width) continue;
#pragma unroll
    for (int group = 0; group < tile_width / 8; ++group) {
      const float first = d[4 * group + 2 * half];
      const float second = d[4 * group + 2 * half + 1];
      if (8 * group + 1 <= below) {
        add_in_memory(place + 8 * group, first, second);
      } else if (8 * group <= below) {
        add_in_memory(place + 8 * group, first);
      }
    }
  }
}

template <bool bfloat16>
__device__ void multiply_keys(const Arguments& arguments, std::uint32_t shared, std::uint32_t full,
                              std::uint32_t empty) {
  const int rank = static_cast<int>(rank_in_cluster());
  const int group = threadIdx.x / 128 - 1;  // each group multiplies one box of 64 rows
  const int lane = threadIdx.x % 32;
  // Lanes 0 and 1 of each warp release a stage in the two blocks.
  const auto release = [&](int stage) {
    if (lane < 2) arrive_at_rank(empty + stage * sizeof(std::uint64_t), lane);
  };
  Ring ring;
  float d[128];
  for (int item = blockIdx.x / 2; item < arguments.schedule.items; item += gridDim.x / 2) {
    const Share share = share_of(item, arguments.schedule, arguments.block_rows, arguments.tokens);
    const int local_row = rank * (tile_width / 2) + group * box_columns;
    const int row = share.block_row * tile_width + local_row;
    const int column = share.block_column * tile_width;
    const bool in_slice = share.slice >= 0;
    const std::int64_t stride = in_slice ? tile_width : arguments.total_stride;
    float* target = in_slice ? arguments.slices + static_cast<std::int64_t>(share.slice) * tile_width * tile_width +
                                   local_row * tile_width
                             : arguments.totals[share.layer] + row * stride + column;
    for (int chunk = share.start; chunk < share.end; chunk += chunk_tokens) {
      const int chunk_end = min(chunk + chunk_tokens, share.end);
      int earlier_stage = -1;
      for (int token = chunk; token < chunk_end; token += box_tokens) {
        wait_for(full + ring.stage * sizeof(std::uint64_t), ring.parity);
        const std::uint32_t stage = shared + ring.stage * stage_bytes;
        const std::uint64_t left = describe(stage + group * box_bytes);
        const std::uint64_t right = describe(stage + columns_offset);
        fence_products();
#pragma unroll
        for (int tokens = 0; tokens < box_tokens; tokens += 16) {
          const std::uint64_t offset = tokens * row_bytes >> 4;
          multiply<bfloat16>(d, left + offset, right + offset, token > chunk || tokens > 0);
        }
        commit_products();
        // One step may be incomplete while the next one is issued; the operands of earlier steps have been read.
        wait_for_products<1>();
        if (earlier_stage >= 0) release(earlier_stage);
        earlier_stage = ring.stage;
        ring.advance();
      }
      wait_for_products<0>();
      release(earlier_stage);
      add_accumulator(d, target, stride, row, column, arguments.width);
    }
  }
}

// The code of every thread of a block.
template <bool bfloat16>
__device__ void add_second_moments_in_block(const Arguments& arguments) {
  const std::uint32_t shared = (shared_address(dynamic_shared()) + 1023) & ~1023u;
  const std::uint32_t full = shared + stages * stage_bytes;
  const std::uint32_t empty = full + stages * sizeof(std::uint64_t);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      init_barrier(full + stage * sizeof(std::uint64_t), 1);
      init_barrier(empty + stage * sizeof(std::uint64_t), 2 * multiplying_warps);
    }
    publish_barriers();
  }
  synchronize_cluster();
  if (threadIdx.x < 128) {
    decrease_registers_to<40>();
    if (threadIdx.x == 0) copy_keys(arguments, shared, full, empty);
  } else {
    increase_registers_to<232>();
    multiply_keys<bfloat16>(arguments, shared, full, empty);
  }
  // A block must not end while the other one may write to its shared memory.
  synchronize_cluster();
}

// Adds the slices of one tile to its total, in order. A block adds all 256 columns of some rows.
__device__ inline void add_slices_in_block(const Arguments& arguments) {
  const CudaSchedule& schedule = arguments.schedule;
  const Share share = share_of(schedule.whole + static_cast<int>(blockIdx.x) * schedule.splits, schedule,
                               arguments.block_rows, arguments.tokens);
  const int column = share.block_column * tile_width + threadIdx.x;
  const float* first =
      arguments.slices + static_cast<std::int64_t>(share.slice) * tile_width * tile_width + threadIdx.x;
  for (int local = blockIdx.y; local < tile_width; local += gridDim.y) {
    const int row = share.block_row * tile_width + local;
    if (row >= arguments.width || column > row) continue;
    float sum = 0;
    for (int split = 0; split < schedule.splits; ++split) {
      sum += first[(static_cast<std::int64_t>(split) * tile_width + local) * tile_width];
    }
    arguments.totals[share.layer][row * arguments.total_stride + column] += sum;
  }
}

}  // namespace rocr::sm90
