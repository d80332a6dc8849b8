// Conversions between every dtype and vectors of float32: widening, and rounding to nearest or stochastically.
// Included by simd_kernels.h.

typedef float Floats __attribute__((vector_size(4 * ROCR_WIDTH), aligned(4), may_alias));
typedef std::int32_t Integers __attribute__((vector_size(4 * ROCR_WIDTH), aligned(4), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(4 * ROCR_WIDTH), aligned(4), may_alias));
typedef std::uint8_t Bytes __attribute__((vector_size(ROCR_WIDTH), aligned(1), may_alias));
typedef std::uint16_t Halves __attribute__((vector_size(2 * ROCR_WIDTH), aligned(2), may_alias));

constexpr std::uint32_t magnitude_bits = 0x7fffffff;
constexpr std::uint32_t infinity = 0x7f800000;
constexpr std::uint32_t half_infinity = 0x7c00;
constexpr std::uint32_t half_nan = 0x7e00;
constexpr std::uint32_t half_overflow = 0x477ff000;  // 65520: from here on float16 rounds to infinity
constexpr std::uint32_t smallest_half = 113 << 23;   // 2^-14, the smallest normal float16, as a float32
constexpr std::uint32_t rebias = 112 << 23;          // difference of the exponents of float16 and float32

ROCR_INLINE Bits select(Integers mask, Bits yes, Bits no) { return mask ? yes : no; }
ROCR_INLINE Bits all(std::uint32_t value) { return value - Bits{}; }

template <DType dtype>
ROCR_INLINE Floats widen(const void* source) {
  if (dtype == DType::float32) return *static_cast<const Floats*>(source);
  const Bits bits = ROCR_WIDEN(*static_cast<const Halves*>(source));
  if (dtype == DType::bfloat16) return (Floats)(bits << 16);
  const Bits magnitude = (bits & 0x7fff) << 13;
  const Bits exponent = magnitude & (half_infinity << 13);
  const Bits normal = magnitude + rebias + ((Bits)(exponent == half_infinity << 13) & rebias);
  const Bits subnormal = (Bits)((Floats)(magnitude + smallest_half) - 0x1p-14f);
  return (Floats)(select(exponent == 0, subnormal, normal) | (bits & 0x8000) << 16);
}

// Restores the sign, and infinity and NaN, which rounding would change to other values.
ROCR_INLINE Halves finish_float16(Bits half, Bits bits) {
  const Bits magnitude = bits & magnitude_bits;
  half = select(magnitude >= infinity, all(half_infinity), half);
  half = select(magnitude > infinity, all(half_nan), half);
  return __builtin_convertvector(half | (bits >> 16 & 0x8000), Halves);
}

// Truncates to the upper 16 bits. A NaN is not rounded: it could become another value.
ROCR_INLINE Halves finish_bfloat16(Bits rounded, Floats value) {
  const Bits nan = (Bits)value >> 16 | 0x40;
  return __builtin_convertvector(select(value != value, nan, rounded >> 16), Halves);
}

// Rounds to nearest, ties to even.
template <DType dtype>
ROCR_INLINE Halves narrow_nearest(Floats value) {
  const Bits bits = (Bits)value, magnitude = bits & magnitude_bits;
  if (dtype == DType::bfloat16) return finish_bfloat16(bits + 0x7fff + (bits >> 16 & 1), value);
  const Bits normal = (magnitude - rebias + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // The last bit of 0.5f is 2^-24, like that of a subnormal float16: the float32 sum rounds as required.
  const Bits subnormal = (Bits)((Floats)magnitude + 0.5f) - (Bits)(0.5f - Floats{});
  const Bits half = select(magnitude < smallest_half, subnormal, normal);
  return finish_float16(select(magnitude >= half_overflow, all(half_infinity), half), bits);
}

#if defined(ROCR_NARROW_TWO)
// Writes two vectors as the nearest bfloat16. Returns whether it did: not if there is a NaN, which is not rounded.
ROCR_INLINE bool store_two_bfloat16(char* target, Floats first, Floats second) {
  if (ROCR_ANY_NAN(first, second)) return false;
  const Bits low = (Bits)first, high = (Bits)second;
  const Bits rounded_low = low + 0x7fff + (low >> 16 & 1), rounded_high = high + 0x7fff + (high >> 16 & 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), ROCR_NARROW_TWO(rounded_low >> 16, rounded_high >> 16));
  return true;
}
#endif

// Adds random bits below the last bit that is kept, then truncates: the expectation of the result is `value`.
template <DType dtype>
ROCR_INLINE Halves narrow_stochastic(Floats value, Bits random) {
  const Bits bits = (Bits)value, magnitude = bits & magnitude_bits;
  if (dtype == DType::bfloat16) return finish_bfloat16(bits + (random & 0xffff), value);
  const Bits normal = (magnitude - rebias + (random & 0x1fff)) >> 13;
  const Integers is_small = magnitude < smallest_half;
  const Floats steps = (Floats)((Bits)is_small & magnitude) * 0x1p24f;
  const Floats uniform = __builtin_convertvector((Integers)(random >> 8), Floats) * 0x1p-24f;
  const Bits subnormal = (Bits) __builtin_convertvector(steps + uniform, Integers);
  const Bits half = select(is_small, subnormal, normal);
  return finish_float16(select(half > half_infinity, all(half_infinity), half), bits);
}

// 32 random bits for each column: the finalizer of MurmurHash3 (Appleby, public domain) of a keyed sequence.
ROCR_INLINE Bits random_bits(std::uint64_t key, std::int64_t first_column) {
  static const std::uint32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Bits bits = *reinterpret_cast<const Bits*>(lanes) + static_cast<std::uint32_t>(first_column);
  bits = (bits ^ static_cast<std::uint32_t>(key)) * static_cast<std::uint32_t>(key >> 32 | 1);
  bits = (bits ^ bits >> 16) * 0x85ebca6b;
  bits = (bits ^ bits >> 13) * 0xc2b2ae35;
  return bits ^ bits >> 16;
}
