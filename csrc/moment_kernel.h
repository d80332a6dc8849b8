// The interface of a kernel of second moments: how the tokens of a moment are packed and multiplied. Which thread
// does what, and when, is decided in second_moment.cpp.
#pragma once

#include <cstdint>

namespace rocr {

// The operands of one second moment: total (size, size) += keysᵀ keys over the rows of keys (tokens, size).
struct Moment {
  float* total;
  std::int64_t total_stride;
  const char* keys;
  std::int64_t keys_stride, tokens;
};

// The kernel for one size and dtype of keys. Tokens are split into slices, which depend on nothing but their number.
// The items that pack a slice are independent of each other, and so are those that multiply it.
class MomentKernel {
 public:
  virtual ~MomentKernel() = default;

  virtual std::int64_t slices(std::int64_t tokens) const = 0;

  // Items of a slice that pack it, and that multiply it.
  virtual std::int64_t packings() const = 0;
  virtual std::int64_t products() const = 0;

  // Memory for any packed slice of a moment of at most this many tokens, and for the sums of a worker.
  virtual std::int64_t packed_floats(std::int64_t tokens) const = 0;
  virtual std::int64_t worker_floats() const { return 0; }

  virtual void pack(const Moment& moment, std::int64_t slice, std::int64_t item, float* packed) const = 0;

  // Adds the products of a packed slice to a part of the lower triangle of the total.
  virtual void multiply(const Moment& moment, std::int64_t slice, std::int64_t item, const float* packed,
                        float* mine) const = 0;
};

}  // namespace rocr
