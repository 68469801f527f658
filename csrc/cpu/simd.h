// One vector of floats, `vf`, and the few operations the kernels need on it. Each instruction set has its own header;
// all of them define the same names, so the algorithms above are written once.
#pragma once
#include <cstdint>
#include <cstring>

#define DK_INLINE static inline __attribute__((always_inline))
#define DK_INLINE_MEMBER inline __attribute__((always_inline))
#define DK_UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
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

// One bit per lane of a vector; bit c set = lane c is allowed.
using LaneBits = uint32_t;
constexpr LaneBits kAllLanes = (1u << kV) - 1;

// 2^x for any x <= 0, also -inf (exactly 0) and NaN (stays NaN). Minimax polynomial on [-0.5, 0.5] with relative
// error 2e-9, so float32 rounding dominates.
DK_INLINE vf exp2_nonpositive(vf x) {
  x = max_keep_nan(set1(-127.0f), x);
  const vf n = round_nearest(x);
  const vf f = x - n;
  vf p = set1(0x1.41d334p-13f);
  p = fma(p, f, set1(0x1.5f456ap-10f));
  p = fma(p, f, set1(0x1.3b2dbcp-7f));
  p = fma(p, f, set1(0x1.c6aed4p-5f));
  p = fma(p, f, set1(0x1.ebfbdap-3f));
  p = fma(p, f, set1(0x1.62e43p-1f));
  p = fma(p, f, set1(1.0f));
  return p * power_of_two(n);
}

}  // namespace
