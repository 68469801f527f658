// AVX2 with FMA: 8 floats a vector.
#pragma once
#include <immintrin.h>

namespace {

using vf = __m256;
constexpr int kV = 8;
constexpr int kMicroRows = 4, kMicroVectors = 3;  // 12 accumulators + 3 columns + 1 row value of 16 registers

DK_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
DK_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
DK_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
DK_INLINE vf zero() { return _mm256_setzero_ps(); }
DK_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
DK_INLINE vf max_keep_nan(vf a, vf b) { return _mm256_max_ps(a, b); }  // NaN in b is kept
DK_INLINE float reduce_add(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
DK_INLINE float reduce_max(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
DK_INLINE vf round_nearest(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
DK_INLINE vf power_of_two(vf n) {  // 2^n for whole n in [-127, 0]; 0 for n = -127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
DK_INLINE vf where_positive(vf x, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, zero(), _CMP_GT_OQ));
}
DK_INLINE vf select(uint32_t bits, vf yes, vf no) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(on));
}

// values[index[c] - index[0]] for index rising by 0 or 1 a lane.
DK_INLINE vf lookup(const float* values, const int32_t* index) {
  const __m256i i = _mm256_loadu_si256((const __m256i*)index);
  return _mm256_permutevar8x32_ps(load(values), _mm256_sub_epi32(i, _mm256_set1_epi32(index[0])));
}

// scale where the 16-bit draw reaches the threshold, else 0.
DK_INLINE vf keep_factor(const uint16_t* draws, uint32_t threshold, float scale) {
  const __m256i d = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)draws));
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)threshold), d);
  return _mm256_andnot_ps(_mm256_castsi256_ps(below), set1(scale));
}

DK_INLINE void transpose(vf* r) {  // in place, kV x kV
  vf t[8];
  DK_UNROLL
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  DK_UNROLL
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  DK_UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
  DK_UNROLL
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

// The sum of the lanes of r[i] in lane i.
DK_INLINE vf lane_sums(vf* r) {
  DK_UNROLL
  for (int i = 0; i < 4; i++)
    r[i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]) + _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  DK_UNROLL
  for (int i = 0; i < 2; i++) {
    const __m256d a = (__m256d)r[2 * i], b = (__m256d)r[2 * i + 1];
    r[i] = (vf)_mm256_unpacklo_pd(a, b) + (vf)_mm256_unpackhi_pd(a, b);
  }
  return _mm256_permute2f128_ps(r[0], r[1], 0x20) + _mm256_permute2f128_ps(r[0], r[1], 0x31);
}

// Four 64-bit lanes, for the dropout generator.
using vu64 = __m256i;
constexpr int kV64 = 4;
DK_INLINE vu64 u64_set1(uint64_t x) { return _mm256_set1_epi64x((int64_t)x); }
DK_INLINE vu64 u64_iota(uint64_t first) { return _mm256_add_epi64(u64_set1(first), _mm256_setr_epi64x(0, 1, 2, 3)); }
DK_INLINE vu64 u64_mul_low32(vu64 a, vu64 b) { return _mm256_mul_epu32(a, b); }  // low halves only
DK_INLINE vu64 u64_xor(vu64 a, vu64 b) { return _mm256_xor_si256(a, b); }
DK_INLINE vu64 u64_high(vu64 a) { return _mm256_srli_epi64(a, 32); }
// The low half of `low` below the low half of `high`.
DK_INLINE vu64 u64_joined(vu64 low, vu64 high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa); }
DK_INLINE void u64_store(uint64_t* p, vu64 a) { _mm256_storeu_si256((__m256i*)p, a); }

}  // namespace
