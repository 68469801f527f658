// Formats of numbers, and the arithmetic that PTX defines otherwise than C++.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ptx {

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

inline float from_bf16(uint32_t half) { return bits_as<float>(half << 16); }
inline uint16_t to_bf16(float value) {
  uint32_t x = bits_as<uint32_t>(value);
  uint32_t rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
  return value != value ? 0x7fff : rounded;
}
#if defined(__F16C__)
inline float from_f16(uint32_t half) { return _cvtsh_ss(half & 0xffff); }
inline uint16_t to_f16(float value) { return value != value ? 0x7fff : _cvtss_sh(value, 0); }
#else
inline float from_f16(uint32_t half) {
  _Float16 x = bits_as<_Float16>(uint16_t(half));
  return float(x);
}
inline uint16_t to_f16(float value) { return value != value ? 0x7fff : bits_as<uint16_t>(_Float16(value)); }
#endif
// Numbers of 19 bits in the upper bits of 32; the tensor cores do not look at the others.
inline float from_tf32(uint32_t x) { return bits_as<float>(x & 0xffffe000u); }

// A NaN loses against a number; -0 is below +0.
inline float larger(float a, float b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
inline float smaller(float a, float b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return exp2f(x); }
inline float exp2_approx_flushed(float x) { return flush(exp2f(flush(x))); }
inline float log2_approx(float x) { return log2f(x); }

template <float (*kFrom)(uint32_t), uint16_t (*kTo)(float), class F>
inline uint32_t of_pairs(F f, uint32_t a, uint32_t b, uint32_t c = 0) {
  uint32_t low = kTo(f(kFrom(a & 0xffff), kFrom(b & 0xffff), kFrom(c & 0xffff)));
  uint32_t high = kTo(f(kFrom(a >> 16), kFrom(b >> 16), kFrom(c >> 16)));
  return low | high << 16;
}

template <class Int>
inline Int float_to(float x) {  // towards zero, saturated, NaN is 0
  if (x != x) return 0;
  constexpr double kLow = double(std::numeric_limits<Int>::min()), kHigh = double(std::numeric_limits<Int>::max());
  return double(x) <= kLow    ? std::numeric_limits<Int>::min()
         : double(x) >= kHigh ? std::numeric_limits<Int>::max()
                              : Int(x);
}

}  // namespace ptx
