// Matrices of random numbers of every dtype in guarded memory, with numbers between their rows that must stay.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "../../../csrc/simd.h"
#include "memory.h"

using rocr::DType;

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
  std::uint32_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<std::uint32_t>(state_ >> 16);
  }

 private:
  std::uint64_t state_;
};

inline double value_of(DType dtype, const char* place) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, place, rocr::bytes_of(dtype));
  if (dtype == DType::float16) {
    const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
    const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return bits >> 15 ? -size : size;
  }
  if (dtype == DType::bfloat16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest relative error of rounding to nearest.
inline double rounding_of(DType dtype) {
  return dtype == DType::float32 ? 0x1p-24 : dtype == DType::bfloat16 ? 0x1p-8 : 0x1p-11;
}

struct Matrix {
  static constexpr int sentinel = 0x7f;  // as a number of any dtype: a NaN

  DType dtype;
  std::int64_t rows, columns, stride;
  std::unique_ptr<Guarded> memory;

  Matrix(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t stride, bool at_end, Random& random)
      : dtype(dtype), rows(rows), columns(columns), stride(stride) {
    memory = std::make_unique<Guarded>(bytes(), at_end);
    for (std::int64_t row = 0; row < rows; ++row) {
      if (row + 1 < rows && stride < 1024) std::memset(at(row, columns), sentinel, (stride - columns) * width());
      for (std::int64_t column = 0; column < columns; ++column) put(row, column, random.bits());
    }
  }

  std::size_t width() const { return static_cast<std::size_t>(rocr::bytes_of(dtype)); }
  std::size_t bytes() const { return rows && columns ? ((rows - 1) * stride + columns) * width() : 0; }
  char* data() const { return memory->data(); }
  char* at(std::int64_t row, std::int64_t column) const { return data() + (row * stride + column) * width(); }
  double value(std::int64_t row, std::int64_t column) const { return value_of(dtype, at(row, column)); }
  float* floats() const { return reinterpret_cast<float*>(data()); }

  // A number of absolute value 1/8 to 4.
  void put(std::int64_t row, std::int64_t column, std::uint32_t random) {
    const std::uint32_t sign = random >> 31, exponent = random >> 28 & 3, mantissa = random & 0x7fffff;
    std::uint32_t bits = sign << 31 | (125 + exponent) << 23 | mantissa;
    if (dtype == DType::bfloat16) bits >>= 16;
    if (dtype == DType::float16) bits = sign << 15 | (13 + exponent) << 10 | mantissa >> 13;
    std::memcpy(at(row, column), &bits, width());
  }

  bool gaps_are_whole() const {
    for (std::int64_t row = 0; row + 1 < rows && stride < 1024; ++row)
      for (const char* byte = at(row, columns); byte < at(row + 1, 0); ++byte)
        if (*byte != sentinel) return false;
    return true;
  }

  std::vector<double> values() const {
    std::vector<double> found;
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t column = 0; column < columns; ++column) found.push_back(value(row, column));
    return found;
  }
};
