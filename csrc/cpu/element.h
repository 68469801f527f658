// Element types of the tensors and their exact conversion to and from float32.
#pragma once
#include "params.h"
#include "simd.h"

namespace {

using namespace dk;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

DK_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
DK_INLINE uint32_t bits_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

DK_INLINE float to_float(bfloat16 x) { return float_from_bits((uint32_t)x.bits << 16); }
DK_INLINE float to_float(float16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  return half;
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // A float with the half's exponent and mantissa is 2^112 too small; the product is exact, subnormals included.
  return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
#endif
}

DK_INLINE void from_float(float x, bfloat16* out) {  // to nearest, ties to even
  const uint32_t bits = bits_from_float(x);
  out->bits = x != x ? 0x7fc0u : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
DK_INLINE void from_float(float x, float16* out) {  // to nearest, ties to even
#ifdef __F16C__
  out->bits = (uint16_t)_cvtss_sh(x, 0);
#elif defined(__aarch64__)
  const __fp16 half = (__fp16)x;
  std::memcpy(&out->bits, &half, sizeof half);
#else
  const uint32_t bits = bits_from_float(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // rounds to 65536 or more
  else if (magnitude < 0x38800000u)                   // subnormal half: the addition aligns and rounds the mantissa
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  else half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  out->bits = (uint16_t)(sign | half);
#endif
}

// Round up to a multiple of the vector width.
DK_INLINE int64_t round_to_vector(int64_t n) { return (n + kV - 1) / kV * kV; }

constexpr int kRowsAhead = 8;  // rows asked for while one is read

DK_INLINE int64_t bytes_of(int64_t type) { return type == kFloat32 ? 4 : 2; }

// The tokens of one head, or the rows of one table: row i starts at data + i * stride bytes.
struct Rows {
  char* data;
  int64_t stride;
  int64_t type;
  char* row(int64_t i) const { return data + i * stride; }
};

template <class T>
DK_INLINE void read_elements(const char* from, int count, float* to) {
  for (int d = 0; d < count; d++) {
    T x;
    std::memcpy(&x, from + d * sizeof(T), sizeof(T));
    to[d] = to_float(x);
  }
}
DK_INLINE void read_bfloat16(const char* from, int count, float* to) {
  int d = 0;
#ifdef DK_HAS_BF16_DOT
  for (; d + kV <= count; d += kV) store(to + d, load_bf16(reinterpret_cast<const uint16_t*>(from) + d));
#endif
  read_elements<bfloat16>(from + d * sizeof(bfloat16), count - d, to + d);
}
DK_INLINE void write_bfloat16(const float* from, int count, char* to) {
  int d = 0;
#ifdef DK_HAS_BF16_DOT
  for (; d + kV <= count; d += kV) store_bf16(reinterpret_cast<uint16_t*>(to) + d, load(from + d));
#endif
  for (; d < count; d++) {
    bfloat16 x;
    from_float(from[d], &x);
    std::memcpy(to + d * sizeof x, &x, sizeof x);
  }
}
DK_INLINE void write_float16(const float* from, int count, char* to) {
  for (int d = 0; d < count; d++) {
    float16 x;
    from_float(from[d], &x);
    std::memcpy(to + d * sizeof x, &x, sizeof x);
  }
}

DK_INLINE void copy_floats(const float* from, int count, float* to) {
  int d = 0;
  for (; d + kV <= count; d += kV) store(to + d, load(from + d));
  for (; d < count; d++) to[d] = from[d];
}

// Tokens of one head lie far apart, which hardware prefetchers do not follow. Asking past the end is harmless.
// kLevel 0 brings it to the first-level cache, 1 to the second.
template <int kLevel>
DK_INLINE void prefetch_row(const Rows& rows, int64_t i, int count) {
  const char* from = rows.row(i);
  for (int64_t byte = 0; byte < count * bytes_of(rows.type); byte += 64) __builtin_prefetch(from + byte, 0, 3 - kLevel);
}

DK_INLINE void read_floats(const char* from, int64_t type, int count, float* to) {
  if (type == kFloat32) copy_floats(reinterpret_cast<const float*>(from), count, to);
  else if (type == kBFloat16) read_bfloat16(from, count, to);
  else read_elements<float16>(from, count, to);
}
DK_INLINE void write_floats(const float* from, int count, int64_t type, char* to) {
  if (type == kFloat32) copy_floats(from, count, reinterpret_cast<float*>(to));
  else if (type == kBFloat16) write_bfloat16(from, count, to);
  else write_float16(from, count, to);
}

// Read row i as floats and fill with zeros up to `padded`.
static void read_row(const Rows& rows, int64_t i, int count, int padded, float* to) {
  prefetch_row<0>(rows, i + kRowsAhead, count);
  read_floats(rows.row(i), rows.type, count, to);
  for (int d = count; d < padded; d++) to[d] = 0.0f;
}
static void write_row(const float* from, int count, const Rows& rows, int64_t i) {
  write_floats(from, count, rows.type, rows.row(i));
}

}  // namespace
