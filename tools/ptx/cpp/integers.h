// Integer instructions that are more than an operator of C++.
#pragma once
#include <cstdint>
#include <type_traits>

namespace ptx {

inline uint32_t bfe_unsigned(uint32_t a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (length == 0 || position > 31) return 0;
  a >>= position;
  return length >= 32 ? a : a & ((1u << length) - 1);
}
// What lies beyond the top bit is the sign.
inline int32_t bfe_signed(int32_t a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (length == 0) return 0;
  if (position > 31) return a >> 31;
  if (position + length > 32) length = 32 - position;
  return int32_t(uint32_t(a) << (32 - position - length)) >> (32 - length);
}
inline uint32_t reversed(uint32_t a) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i++) result |= (a >> i & 1) << (31 - i);
  return result;
}
// Insert `length` bits of a into b at `position`.
inline uint32_t bfi(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (length == 0 || position > 31) return b;
  uint32_t mask = (length >= 32 ? ~0u : (1u << length) - 1) << position;
  return (b & ~mask) | (a << position & mask);
}
// Four bytes chosen from eight; bit 3 of a choice repeats the byte's sign instead.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t choice) {
  uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t nibble = choice >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
// a and b as one number of 64 bits, b above, shifted; the count stops at 32 or wraps at 32.
inline uint32_t shf_left(uint32_t a, uint32_t b, uint32_t n) { return uint32_t((uint64_t(b) << 32 | a) << n >> 32); }
inline uint32_t shf_right(uint32_t a, uint32_t b, uint32_t n) { return uint32_t((uint64_t(b) << 32 | a) >> n); }
// Three inputs, a table of eight bits.
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
// A division by zero yields what the hardware yields: all ones; the dividend is the remainder.
template <class T>
inline T quotient(T a, T b) {
  return b == 0 ? T(-1) : b == T(-1) && T(-1) < 0 ? T(-std::make_unsigned_t<T>(a)) : a / b;
}
template <class T>
inline T remainder(T a, T b) {
  return b == 0 ? a : b == T(-1) && T(-1) < 0 ? 0 : a % b;
}

}  // namespace ptx
