// The tile and the tokens of an item of a second moment. The order of tiles is that of kernels/second_moment.py.
#pragma once

#include "cuda_kernels.h"

namespace rocr {

// Block rows that are walked together, column by column, so that concurrent tiles share keys in L2.
constexpr int group_rows = 8;

// Row of entry `index` of a lower triangle that is counted row by row.
__host__ __device__ inline int triangle_row(int index) {
  int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  if (row * (row + 1) / 2 > index) --row;
  if ((row + 1) * (row + 2) / 2 <= index) ++row;
  return row;
}

// A tile of a layer, the range of tokens that an item sums, and its slice; negative: the item adds to the total.
struct Share {
  int layer, block_row, block_column, start, end, slice;
};

__host__ __device__ inline Share share_of(int item, const CudaSchedule& schedule, int block_rows, int tokens) {
  Share share{};
  share.slice = item - schedule.whole;
  const bool in_slice = share.slice >= 0;
  const int tile = in_slice ? schedule.whole + share.slice / schedule.splits : item;
  share.start = in_slice ? share.slice % schedule.splits * schedule.split_tokens : 0;
  share.end = in_slice && share.start + schedule.split_tokens < tokens ? share.start + schedule.split_tokens : tokens;

  const int tiles = block_rows * (block_rows + 1) / 2;
  const int index = tile % tiles;
  share.layer = tile / tiles;
  const int first = triangle_row(index) / group_rows * group_rows;
  const int height = block_rows - first < group_rows ? block_rows - first : group_rows;
  const int within = index - first * (first + 1) / 2;
  const int rectangle = first * height;
  if (within < rectangle) {
    share.block_row = first + within % height;
    share.block_column = within / height;
  } else {
    const int corner = within - rectangle;
    const int corner_row = triangle_row(corner);
    share.block_row = first + corner_row;
    share.block_column = first + corner - corner_row * (corner_row + 1) / 2;
  }
  return share;
}

}  // namespace rocr
