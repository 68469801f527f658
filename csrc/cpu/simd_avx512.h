// AVX-512 (F, BW, VL, DQ): 16 floats a vector. With AVX512_BF16 also dot products of bfloat16 pairs.
#pragma once
#include <immintrin.h>

namespace {

using vf = __m512;
constexpr int kV = 16;
#define DK_NATIVE_LANES 1                         // run_sums and bits_from_bytes below
#define DK_NATIVE_EXPONENT 1                      // floor_exponent and times_power_of_two below
constexpr int kMicroRows = 8, kMicroVectors = 3;  // 24 accumulators + 3 columns + 1 row value of 32 registers

DK_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
DK_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
DK_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
DK_INLINE vf zero() { return _mm512_setzero_ps(); }
DK_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
DK_INLINE vf max_keep_nan(vf a, vf b) { return _mm512_max_ps(a, b); }  // NaN in b is kept
DK_INLINE float reduce_add(vf x) { return _mm512_reduce_add_ps(x); }
DK_INLINE float reduce_max(vf x) { return _mm512_reduce_max_ps(x); }
DK_INLINE vf round_nearest(vf x) { return _mm512_roundscale_ps(x, 0); }
DK_INLINE vf floor_exponent(vf x) { return x; }
DK_INLINE vf times_power_of_two(vf p, vf n, vf x) {  // p * 2^n, and 0 for x below -125; NaN in x is kept
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ), p, n);
}
DK_INLINE vf where_positive(vf x, vf yes, vf no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), yes);
}
DK_INLINE vf select(uint32_t bits, vf yes, vf no) { return _mm512_mask_mov_ps(no, (__mmask16)bits, yes); }

// values[index[c] - index[0]] for index rising by 0 or 1 a lane.
DK_INLINE vf lookup(const float* values, const int32_t* index) {
  const __m512i i = _mm512_loadu_si512(index);
  return _mm512_permutexvar_ps(_mm512_sub_epi32(i, _mm512_set1_epi32(index[0])), load(values));
}

// Sums of the lanes with equal index, in the order of the index, zeros behind; index rises by 0 or 1 a lane.
DK_INLINE vf run_sums(vf x, const int32_t* index) {
  const __m512i i = _mm512_loadu_si512(index), nothing = _mm512_setzero_si512();
  // After the step of distance s every lane holds the sum of up to 2s lanes from itself on within its run.
#define DK_SAME(s) _mm512_cmpeq_epi32_mask(_mm512_alignr_epi32(_mm512_set1_epi32(-1), i, s), i)
#define DK_STEP(s, same) \
  x = _mm512_mask_add_ps(x, same, x, _mm512_castsi512_ps(_mm512_alignr_epi32(nothing, _mm512_castps_si512(x), s)));
  DK_STEP(1, DK_SAME(1))
  DK_STEP(2, DK_SAME(2))
  if (const __mmask16 same = DK_SAME(4)) {  // runs of more than 4 are rare before the index saturates
    DK_STEP(4, same)
    DK_STEP(8, DK_SAME(8))
  }
#undef DK_STEP
#undef DK_SAME
  const __mmask16 first = _mm512_cmpneq_epi32_mask(_mm512_alignr_epi32(i, _mm512_set1_epi32(-1), 15), i);
  return _mm512_maskz_compress_ps(first, x);
}

DK_INLINE uint32_t bits_from_bytes(const uint8_t* p, int count) {
  const __mmask16 inside = (__mmask16)((1u << count) - 1);
  return _mm_test_epi8_mask(_mm_maskz_loadu_epi8(inside, p), _mm_set1_epi8(-1));
}

// scale where the 16-bit draw reaches the threshold, else 0.
DK_INLINE vf keep_factor(const uint16_t* draws, uint32_t threshold, float scale) {
  const __m256i d = _mm256_loadu_si256((const __m256i*)draws);
  return _mm512_maskz_mov_ps(_mm256_cmpge_epu16_mask(d, _mm256_set1_epi16((int16_t)threshold)), set1(scale));
}

DK_INLINE void transpose(vf* r) {  // in place, kV x kV
  vf t[16];
  DK_UNROLL
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  DK_UNROLL
  for (int i = 0; i < 4; i++) {
    const __m512d a = (__m512d)t[4 * i], b = (__m512d)t[4 * i + 1];
    const __m512d c = (__m512d)t[4 * i + 2], d = (__m512d)t[4 * i + 3];
    r[4 * i] = (vf)_mm512_unpacklo_pd(a, c);
    r[4 * i + 1] = (vf)_mm512_unpackhi_pd(a, c);
    r[4 * i + 2] = (vf)_mm512_unpacklo_pd(b, d);
    r[4 * i + 3] = (vf)_mm512_unpackhi_pd(b, d);
  }
  DK_UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
  DK_UNROLL
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// The sum of the lanes of r[i] in lane i.
DK_INLINE vf lane_sums(vf* r) {
  DK_UNROLL
  for (int i = 0; i < 8; i++)
    r[i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]) + _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  DK_UNROLL
  for (int i = 0; i < 4; i++) {
    const __m512d a = (__m512d)r[2 * i], b = (__m512d)r[2 * i + 1];
    r[i] = (vf)_mm512_unpacklo_pd(a, b) + (vf)_mm512_unpackhi_pd(a, b);
  }
  for (int count = 2; count > 0; count /= 2)
    for (int i = 0; i < count; i++)
      r[i] = _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xdd);
  return r[0];
}

// Eight 64-bit lanes, for the dropout generator.
using vu64 = __m512i;
constexpr int kV64 = 8;
DK_INLINE vu64 u64_set1(uint64_t x) { return _mm512_set1_epi64((int64_t)x); }
DK_INLINE vu64 u64_iota(uint64_t first) {
  return _mm512_add_epi64(u64_set1(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
DK_INLINE vu64 u64_mul_low32(vu64 a, vu64 b) { return _mm512_mul_epu32(a, b); }  // low halves only
DK_INLINE vu64 u64_xor(vu64 a, vu64 b) { return _mm512_xor_si512(a, b); }
DK_INLINE vu64 u64_high(vu64 a) { return _mm512_srli_epi64(a, 32); }
// The low half of `low` below the low half of `high`.
DK_INLINE vu64 u64_joined(vu64 low, vu64 high) { return _mm512_mask_shuffle_epi32(low, 0xaaaa, high, _MM_PERM_CCAA); }
DK_INLINE void u64_store(uint64_t* p, vu64 a) { _mm512_storeu_si512(p, a); }

#ifdef __AVX512BF16__
#define DK_HAS_BF16_DOT 1
DK_INLINE vf dot_bf16_pairs(uint32_t a, vf b, vf c) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_castps_si512(b));
}
DK_INLINE vf dot_bf16_pairs(vf a, vf b, vf c) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
// pairs[c] = even[c] in the low half, odd[c] in the high half.
DK_INLINE void interleave_bf16(const uint16_t* even, const uint16_t* odd, uint32_t* pairs) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
  _mm512_storeu_si512(pairs, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
// Both halves of each pair times a power of two: exact.
DK_INLINE vf scale_bf16_pairs(vf pairs, vf factor) {
  const __m512i x = _mm512_castps_si512(pairs), high = _mm512_set1_epi32((int)0xffff0000);
  const vf first = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)) * factor;
  const vf second = _mm512_castsi512_ps(_mm512_and_si512(x, high)) * factor;
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16),
                                             _mm512_and_si512(_mm512_castps_si512(second), high)));
}
DK_INLINE void store_bf16(uint16_t* p, vf x, vf next) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(next, x)); }
DK_INLINE vf load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
// Pairs of even[c] in the low half and odd[c] in the high half, rounded.
DK_INLINE void store_bf16_pairs(float* pairs, vf even, vf odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}
DK_INLINE void store_bf16(uint16_t* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#endif

}  // namespace
