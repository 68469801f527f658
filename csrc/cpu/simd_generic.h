// Plain C++ on the compiler's own 16-byte vectors: SSE2 on x86-64, NEON on ARM.
#pragma once
#include <cmath>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

using vf = float __attribute__((vector_size(16)));
constexpr int kV = 4;
constexpr int kMicroRows = 4, kMicroVectors = 2;  // 8 accumulators + 2 columns + 1 row value of 16 registers

DK_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
DK_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
DK_INLINE vf set1(float x) { return vf{x, x, x, x}; }
DK_INLINE vf zero() { return set1(0.0f); }
DK_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
DK_INLINE vf max_keep_nan(vf a, vf b) { return a > b ? a : b; }  // NaN in b is kept

#ifndef __ARM_FEATURE_FMA
// Without a fused multiply-add every product would be rounded before it is summed, and large scores would err more than
// the error budget allows. Processors this old gain little from this variant anyway; it has to be right.
#define DK_WIDE_SUM 1
using Sum = double __attribute__((vector_size(32)));
DK_INLINE Sum zero_sum() { return Sum{0.0, 0.0, 0.0, 0.0}; }
DK_INLINE Sum sum_product(vf a, vf b, Sum c) {
  return c + __builtin_convertvector(a, Sum) * __builtin_convertvector(b, Sum);
}
DK_INLINE vf rounded(Sum x) { return __builtin_convertvector(x, vf); }
#endif

DK_INLINE float reduce_add(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
DK_INLINE float reduce_max(vf x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
DK_INLINE vf round_nearest(vf x) {  // |x| < 2^22
  const vf shift = set1(12582912.0f);
  return (x + shift) - shift;
}
DK_INLINE vf power_of_two(vf n) {  // 2^n for whole n in [-127, 0]; 0 for n = -127
  uint32_t bits[kV];
  for (int c = 0; c < kV; c++) bits[c] = (n[c] == n[c]) ? (uint32_t)((int32_t)n[c] + 127) << 23 : 0x7fc00000u;
  vf x;
  std::memcpy(&x, bits, sizeof x);
  return x;
}
DK_INLINE vf where_positive(vf x, vf yes, vf no) { return x > 0.0f ? yes : no; }
DK_INLINE vf select(uint32_t bits, vf yes, vf no) {
  vf x;
  for (int c = 0; c < kV; c++) x[c] = (bits >> c & 1) ? yes[c] : no[c];
  return x;
}

// values[index[c] - index[0]] for index rising by 0 or 1 a lane.
DK_INLINE vf lookup(const float* values, const int32_t* index) {
  vf x;
  for (int c = 0; c < kV; c++) x[c] = values[index[c] - index[0]];
  return x;
}

// scale where the 16-bit draw reaches the threshold, else 0.
DK_INLINE vf keep_factor(const uint16_t* draws, uint32_t threshold, float scale) {
  vf x;
  for (int c = 0; c < kV; c++) x[c] = draws[c] >= threshold ? scale : 0.0f;
  return x;
}

DK_INLINE void transpose(vf* r) {  // in place, kV x kV
  vf t[kV];
  for (int i = 0; i < kV; i++)
    for (int c = 0; c < kV; c++) t[i][c] = r[c][i];
  for (int i = 0; i < kV; i++) r[i] = t[i];
}

// The sum of the lanes of r[i] in lane i.
DK_INLINE vf lane_sums(vf* r) {
  vf sums;
  for (int i = 0; i < kV; i++) sums[i] = reduce_add(r[i]);
  return sums;
}

// Two 64-bit lanes, for the dropout generator.
using vu64 = uint64_t __attribute__((vector_size(16)));
constexpr int kV64 = 2;
DK_INLINE vu64 u64_set1(uint64_t x) { return vu64{x, x}; }
DK_INLINE vu64 u64_iota(uint64_t first) { return vu64{first, first + 1}; }
DK_INLINE vu64 u64_mul_low32(vu64 a, vu64 b) {  // low halves only
#ifdef __SSE2__
  return (vu64)_mm_mul_epu32((__m128i)a, (__m128i)b);  // gcc 12 makes three products of what is written below
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
DK_INLINE vu64 u64_xor(vu64 a, vu64 b) { return a ^ b; }
DK_INLINE vu64 u64_high(vu64 a) { return a >> 32; }
// The low half of `low` below the low half of `high`.
DK_INLINE vu64 u64_joined(vu64 low, vu64 high) { return (low & 0xffffffffu) | high << 32; }
DK_INLINE void u64_store(uint64_t* p, vu64 a) { std::memcpy(p, &a, sizeof a); }

}  // namespace
