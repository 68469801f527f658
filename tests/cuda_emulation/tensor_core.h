// Matrix operands of wgmma as PTX documents them: fragments in registers, descriptors of shared memory, swizzles.
#pragma once
#include <cstdint>

namespace emulation {

// PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout": addresses in units of 16 bytes.
struct Descriptor {
  uint32_t start, leading, stride, base_offset, swizzle;
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7), swizzle(bits >> 62) {}
};

// The 128-byte swizzle exchanges the 16-byte units of a 128-byte row: address bits 4 to 6 are XORed with bits 7 to 9.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// The address of element (row, k) of a 64 x 16 operand (or (k, column) of the other one) of 16-bit elements.
// k_contiguous: rows of 64 elements along k, groups of 8 rows `stride` apart. Otherwise rows lie along k, 64 elements of
// the other dimension each, groups of 8 values of k `stride` apart.
inline uint32_t element_address(const Descriptor& d, int row, int k, bool k_contiguous) {
  const int group = k_contiguous ? row / 8 : k / 8, line = k_contiguous ? row % 8 : k % 8;
  const int column = k_contiguous ? k : row;
  return swizzle_128(d.start + group * d.stride + line * 128 + column * 2);
}

// Row and column of accumulator i of a thread of a warpgroup.
inline int accumulator_row(int thread, int i) { return 16 * (thread / 32) + 8 * (i >> 1 & 1) + thread % 32 / 4; }
inline int accumulator_column(int thread, int i) { return 8 * (i >> 2) + 2 * (thread % 4) + (i & 1); }

// Row and column of the two elements, half 0 and 1, in register i of the first operand.
inline int operand_row(int thread, int i) { return 16 * (thread / 32) + 8 * (i & 1) + thread % 32 / 4; }
inline int operand_column(int thread, int i, int half) { return 8 * (i >> 1) + 2 * (thread % 4) + half; }

inline float bfloat16_value(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}
inline float float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 31  ? (mantissa ? __builtin_nanf("") : __builtin_huge_valf())
                : exponent == 0 ? mantissa * 0x1p-24f
                                : __builtin_ldexpf(1024.0f + mantissa, exponent - 25);
  return bits >> 15 ? -value : value;
}
inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float16_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float size = __builtin_fabsf(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  __builtin_frexpf(size, &exponent);
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last place
  const float scaled = __builtin_rintf(__builtin_ldexpf(size, -unit));
  // A mantissa rounded up to 2048 carries into the exponent by the addition.
  return sign | (size == 0 ? 0 : (uint16_t)((unit + 24) * 1024 + (int)scaled));
}

}  // namespace emulation
