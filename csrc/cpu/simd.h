// One vector of floats, `vf`, and the few operations the kernels need on it. Each instruction set has its own header;
// all of them define the same names, so the algorithms above are written once.
#pragma once
#include <cstdint>
#include <cstring>

#define DK_INLINE static inline __attribute__((always_inline))
#define DK_INLINE_MEMBER inline __attribute__((always_inline))
#define DK_NOINLINE __attribute__((noinline))  // large bodies with many callers: copies would only cost compile time
#define DK_UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#elif defined(DK_NEON)
#include "simd_neon.h"
#else
#include "simd_generic.h"
#endif

namespace {

#ifndef DK_WIDE_SUM
// What a product sums in. A fused multiply-add rounds once, so floats will do.
using Sum = vf;
DK_INLINE Sum zero_sum() { return zero(); }
DK_INLINE Sum sum_product(vf a, vf b, Sum c) { return fma(a, b, c); }
DK_INLINE vf rounded(Sum x) { return x; }
#endif

#ifndef DK_NATIVE_EXPONENT
// For exp2_polynomial: clamp x so that nothing below overflows, -inf included; then p * 2^n, 0 where x was clamped.
DK_INLINE vf floor_exponent(vf x) { return max_keep_nan(set1(-127.0f), x); }
DK_INLINE vf times_power_of_two(vf p, vf n, vf) { return p * power_of_two(n); }
#endif

#ifndef DK_NATIVE_LANES
// Sums of the lanes with equal index, in the order of the index, zeros behind; index rises by 0 or 1 a lane.
DK_INLINE vf run_sums(vf x, const int32_t* index) {
  float lanes[kV], sums[kV] = {};
  store(lanes, x);
  for (int c = 0; c < kV; c++) sums[index[c] - index[0]] += lanes[c];
  return load(sums);
}

DK_INLINE uint32_t bits_from_bytes(const uint8_t* p, int count) {
  uint32_t bits = 0;
  for (int c = 0; c < count; c++) bits |= (uint32_t)(p[c] != 0) << c;
  return bits;
}
#endif

// One bit per lane of a vector; bit c set = lane c is allowed.
using LaneBits = uint32_t;
constexpr LaneBits kAllLanes = (1u << kV) - 1;

// 2^x for any x <= 0, also -inf (exactly 0) and NaN (stays NaN): 2^round(x) times a minimax polynomial on [-0.5, 0.5].
template <int kTerms>
DK_INLINE vf exp2_polynomial(vf x, const float (&coefficient)[kTerms]) {
  x = floor_exponent(x);
  const vf n = round_nearest(x);
  const vf f = x - n;
  vf p = set1(coefficient[0]);
  DK_UNROLL
  for (int i = 1; i < kTerms; i++) p = fma(p, f, set1(coefficient[i]));
  return times_power_of_two(p, n, x);
}
// Relative error 2e-9: float32 rounding dominates.
DK_INLINE vf exp2_nonpositive(vf x) {
  return exp2_polynomial<7>(
      x, {0x1.41d334p-13f, 0x1.5f456ap-10f, 0x1.3b2dbcp-7f, 0x1.c6aed4p-5f, 0x1.ebfbdap-3f, 0x1.62e43p-1f, 1.0f});
}
// Relative error 3e-6, a thousandth of a bfloat16 step: for what is rounded to bfloat16 next.
DK_INLINE vf exp2_for_bfloat16(vf x) {
  return exp2_polynomial<5>(x, {0x1.3997d6p-7f, 0x1.ca1442p-5f, 0x1.ec06dap-3f, 0x1.62e0dcp-1f, 0x1.ffffe8p-1f});
}

}  // namespace
