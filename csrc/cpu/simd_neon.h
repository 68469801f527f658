// NEON, which ARM calls Advanced SIMD: 8 floats in two registers, so that a tile costs no more bookkeeping than with AVX2.
// With BF16 also dot products of bfloat16 pairs.
#pragma once
#include <arm_neon.h>

namespace {

using quad = float __attribute__((vector_size(16)));
using quad_bits = uint32_t __attribute__((vector_size(16)));
struct vf {
  quad low, high;
};
constexpr int kV = 8;
#define DK_HAS_LANE_PRODUCTS 1                    // FloatWord::multiply_add_lane
constexpr int kMicroRows = 4, kMicroVectors = 3;  // 24 accumulators + 4 row values + columns of 32 registers

DK_INLINE vf operator+(vf a, vf b) { return {a.low + b.low, a.high + b.high}; }
DK_INLINE vf operator-(vf a, vf b) { return {a.low - b.low, a.high - b.high}; }
DK_INLINE vf operator*(vf a, vf b) { return {a.low * b.low, a.high * b.high}; }
DK_INLINE vf operator/(vf a, vf b) { return {a.low / b.low, a.high / b.high}; }
DK_INLINE vf operator-(vf a) { return {-a.low, -a.high}; }

DK_INLINE vf load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
DK_INLINE void store(float* p, vf x) {
  vst1q_f32(p, x.low);
  vst1q_f32(p + 4, x.high);
}
DK_INLINE vf set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
DK_INLINE vf zero() { return set1(0.0f); }
DK_INLINE vf fma(vf a, vf b, vf c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
DK_INLINE vf max_keep_nan(vf a, vf b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }
DK_INLINE float reduce_add(vf x) {
  const quad s = x.low + x.high;
  return (s[0] + s[2]) + (s[1] + s[3]);
}
DK_INLINE float reduce_max(vf x) { return vmaxvq_f32(vmaxq_f32(x.low, x.high)); }
DK_INLINE vf round_nearest(vf x) { return {vrndnq_f32(x.low), vrndnq_f32(x.high)}; }
DK_INLINE quad power_of_two(quad n) { return (quad)vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23); }
DK_INLINE vf power_of_two(vf n) { return {power_of_two(n.low), power_of_two(n.high)}; }  // 0 for n = -127
DK_INLINE vf where_positive(vf x, vf yes, vf no) {
  return {x.low > 0.0f ? yes.low : no.low, x.high > 0.0f ? yes.high : no.high};
}
DK_INLINE vf select(uint32_t bits, vf yes, vf no) {
  // Plain C++, so that constant masks are constants, and those of whole registers nothing at all.
  const quad_bits all = {bits, bits, bits, bits};
  return {(all & quad_bits{1, 2, 4, 8}) != 0 ? yes.low : no.low,
          (all & quad_bits{16, 32, 64, 128}) != 0 ? yes.high : no.high};
}

// values[index[c] - index[0]] for index rising by 0 or 1 a lane.
DK_INLINE vf lookup(const float* values, const int32_t* index) {
  const uint8x16x2_t table = {vld1q_u8((const uint8_t*)values), vld1q_u8((const uint8_t*)(values + 4))};
  const int32x4_t first = vdupq_n_s32(index[0]), scale = vdupq_n_s32(0x04040404), bytes = vdupq_n_s32(0x03020100);
  const auto found = [&](const int32_t* i) {
    return (quad)vqtbl2q_u8(table, (uint8x16_t)vmlaq_s32(bytes, vsubq_s32(vld1q_s32(i), first), scale));
  };
  return {found(index), found(index + 4)};
}

// scale where the 16-bit draw reaches the threshold, else 0.
DK_INLINE vf keep_factor(const uint16_t* draws, uint32_t threshold, float scale) {
  const int16x8_t kept = (int16x8_t)vcgeq_u16(vld1q_u16(draws), vdupq_n_u16((uint16_t)threshold));
  const int32x4_t factor = (int32x4_t)vdupq_n_f32(scale);
  return {(quad)vandq_s32(vmovl_s16(vget_low_s16(kept)), factor), (quad)vandq_s32(vmovl_high_s16(kept), factor)};
}

DK_INLINE void transpose(quad& a, quad& b, quad& c, quad& d) {
  const float64x2_t ab0 = (float64x2_t)vtrn1q_f32(a, b), ab1 = (float64x2_t)vtrn2q_f32(a, b);
  const float64x2_t cd0 = (float64x2_t)vtrn1q_f32(c, d), cd1 = (float64x2_t)vtrn2q_f32(c, d);
  a = (quad)vtrn1q_f64(ab0, cd0);
  b = (quad)vtrn1q_f64(ab1, cd1);
  c = (quad)vtrn2q_f64(ab0, cd0);
  d = (quad)vtrn2q_f64(ab1, cd1);
}
DK_INLINE void transpose(vf* r) {  // in place, kV x kV
  transpose(r[0].low, r[1].low, r[2].low, r[3].low);
  transpose(r[0].high, r[1].high, r[2].high, r[3].high);
  transpose(r[4].low, r[5].low, r[6].low, r[7].low);
  transpose(r[4].high, r[5].high, r[6].high, r[7].high);
  DK_UNROLL
  for (int i = 0; i < 4; i++) {
    const quad across = r[i].high;
    r[i].high = r[4 + i].low;
    r[4 + i].low = across;
  }
}

// The sum of the lanes of r[i] in lane i.
DK_INLINE quad lane_sums(quad a, quad b, quad c, quad d) { return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }
DK_INLINE vf lane_sums(vf* r) {
  quad sums[8];
  DK_UNROLL
  for (int i = 0; i < 8; i++) sums[i] = r[i].low + r[i].high;
  return {lane_sums(sums[0], sums[1], sums[2], sums[3]), lane_sums(sums[4], sums[5], sums[6], sums[7])};
}

// Two 64-bit lanes, for the dropout generator.
using vu64 = uint64_t __attribute__((vector_size(16)));
constexpr int kV64 = 2;
DK_INLINE vu64 u64_set1(uint64_t x) { return vu64{x, x}; }
DK_INLINE vu64 u64_iota(uint64_t first) { return vu64{first, first + 1}; }
DK_INLINE vu64 u64_mul_low32(vu64 a, vu64 b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }  // low halves only
DK_INLINE vu64 u64_xor(vu64 a, vu64 b) { return a ^ b; }
DK_INLINE vu64 u64_high(vu64 a) { return a >> 32; }
// The low half of `low` below the low half of `high`.
DK_INLINE vu64 u64_joined(vu64 low, vu64 high) { return vsliq_n_u64(low, high, 32); }
DK_INLINE void u64_store(uint64_t* p, vu64 a) { vst1q_u64(p, a); }

// a's lane times b, plus c: the lane costs no instruction.
template <int kLane>
DK_INLINE vf fma_lane(quad a, vf b, vf c) {
  return {vfmaq_laneq_f32(c.low, b.low, a, kLane), vfmaq_laneq_f32(c.high, b.high, a, kLane)};
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define DK_HAS_BF16_DOT 1
DK_INLINE quad dot_bf16_pairs(quad a, quad b, quad c) { return vbfdotq_f32(c, (bfloat16x8_t)b, (bfloat16x8_t)a); }
DK_INLINE vf dot_bf16_pairs(uint32_t a, vf b, vf c) {
  const quad pair = (quad)vdupq_n_u32(a);
  return {dot_bf16_pairs(pair, b.low, c.low), dot_bf16_pairs(pair, b.high, c.high)};
}
DK_INLINE vf dot_bf16_pairs(vf a, vf b, vf c) {
  return {dot_bf16_pairs(a.low, b.low, c.low), dot_bf16_pairs(a.high, b.high, c.high)};
}
template <int kLane>
DK_INLINE vf dot_bf16_lane(quad a, vf b, vf c) {
  const bfloat16x8_t pairs = (bfloat16x8_t)a;
  return {vbfdotq_laneq_f32(c.low, (bfloat16x8_t)b.low, pairs, kLane),
          vbfdotq_laneq_f32(c.high, (bfloat16x8_t)b.high, pairs, kLane)};
}
DK_INLINE uint16x8_t rounded_bf16(vf x) { return (uint16x8_t)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(x.low), x.high); }
// pairs[c] = even[c] in the low half, odd[c] in the high half.
DK_INLINE void store_pairs(uint32_t* pairs, uint16x8_t even, uint16x8_t odd) {
  vst1q_u32(pairs, (uint32x4_t)vzip1q_u16(even, odd));
  vst1q_u32(pairs + 4, (uint32x4_t)vzip2q_u16(even, odd));
}
DK_INLINE void interleave_bf16(const uint16_t* even, const uint16_t* odd, uint32_t* pairs) {
  store_pairs(pairs, vld1q_u16(even), vld1q_u16(odd));
}
// Both halves of each pair times a power of two: exact.
DK_INLINE quad scale_bf16_pairs(quad pairs, quad factor) {
  const quad_bits x = (quad_bits)pairs;
  const quad first = (quad)(x << 16) * factor, second = (quad)(x & 0xffff0000u) * factor;
  return (quad)vsriq_n_u32((quad_bits)second, (quad_bits)first, 16);
}
DK_INLINE vf scale_bf16_pairs(vf pairs, vf factor) {
  return {scale_bf16_pairs(pairs.low, factor.low), scale_bf16_pairs(pairs.high, factor.high)};
}
DK_INLINE void store_bf16(uint16_t* p, vf x) { vst1q_u16(p, rounded_bf16(x)); }
DK_INLINE void store_bf16(uint16_t* p, vf x, vf next) {
  store_bf16(p, x);
  store_bf16(p + kV, next);
}
DK_INLINE vf load_bf16(const uint16_t* p) {
  const uint16x8_t x = vld1q_u16(p);
  return {(quad)vshll_n_u16(vget_low_u16(x), 16), (quad)vshll_high_n_u16(x, 16)};
}
// Pairs of even[c] in the low half and odd[c] in the high half, rounded.
DK_INLINE void store_bf16_pairs(float* pairs, vf even, vf odd) {
  store_pairs(reinterpret_cast<uint32_t*>(pairs), rounded_bf16(even), rounded_bf16(odd));
}
#endif

}  // namespace
