// A keyed checksum of memory that tells whether a weight is still what it was: read once, at the speed of memory.
//
// In a block, every 8 bytes are two words of 32 bits, a and b, with words k and l of the key for their place:
//     NH = sum over the block of ((a + k) mod 2^32) * ((b + l) mod 2^32), mod 2^64
// Two blocks that differ, in whatever way, have the same NH with probability 2^-32 at most over the keys, and the same
// two, the second taken with the key a line further on, with 2^-64 (Black, Halevi, Krawczyk, Krovetz, Rogaway 1999,
// "UMAC: fast and secure message authentication", theorems 4.2 and 4.3). The first sums of all blocks, two halves each,
// are the coefficients of a polynomial modulo 2^61 - 1, read off at a secret point, and the second ones of another. Two
// contents of n blocks and of the same length therefore share a checksum with probability
//     (2^-32 + 2 n / 2^61)^2 at most: below 2^-63 up to a terabyte.
// That holds for any two contents chosen without the key, which is random and never leaves the process. All variants
// return the same.
#pragma once
#include <algorithm>

#include "params.h"
#include "simd.h"

namespace {

constexpr int64_t kLine = 64, kBlockLines = 64;  // bytes, and lines of a block
constexpr int kLineVectors = kLine / sizeof(vu64);
static_assert(dk::kChecksumKeyBytes == (kBlockLines + 1) * kLine + 2 * sizeof(uint64_t), "");

using Words = uint32_t __attribute__((vector_size(sizeof(vu64))));
using Products = uint64_t __attribute__((vector_size(sizeof(vu64))));

DK_INLINE Products products(const char* data, const char* key) {
  Words words, keys;
  std::memcpy(&words, data, sizeof words);
  std::memcpy(&keys, key, sizeof keys);
  const vu64 sums = (vu64)(words + keys);
  return (Products)u64_mul_low32(sums, u64_high(sums));
}

// Add both NH of some lines, whose key starts at `key`, to `sums`.
DK_INLINE void add_lines(const char* data, int64_t lines, const char* key, uint64_t* sums) {
  Products first[kLineVectors] = {}, second[kLineVectors] = {};
  for (int64_t at = 0; at < lines * kLine; at += kLine) {
    DK_UNROLL
    for (int i = 0; i < kLineVectors; i++) {
      const int64_t vector = at + i * (int64_t)sizeof(vu64);
      first[i] += products(data + vector, key + vector);
      second[i] += products(data + vector, key + kLine + vector);
    }
  }
  for (int i = 0; i < kLineVectors; i++)
    for (int c = 0; c < kV64; c++) sums[0] += first[i][c], sums[1] += second[i][c];
}

// value * point + coefficient, modulo 2^61 - 1; `value` and `point` are below that.
DK_INLINE uint64_t horner(uint64_t value, uint64_t point, uint64_t coefficient) {
  constexpr uint64_t kPrime = (1ull << 61) - 1;
  const unsigned __int128 x = (unsigned __int128)value * point + coefficient;
  const uint64_t folded = ((uint64_t)x & kPrime) + (uint64_t)(x >> 61);
  return folded >= kPrime ? folded - kPrime : folded;
}

// `key`: kChecksumKeyBytes random bytes, the same for all that is compared; `result`: two words.
static void checksum(const char* data, int64_t bytes, const char* key, uint64_t* result) {
  uint64_t points[2];
  std::memcpy(points, key + (kBlockLines + 1) * kLine, sizeof points);
  for (int i = 0; i < 2; i++) points[i] = horner(points[i] >> 3, 1, 0), result[i] = (uint64_t)bytes;
  for (int64_t at = 0; at < bytes; at += kBlockLines * kLine) {
    const int64_t left = std::min(bytes - at, kBlockLines * kLine), lines = left / kLine;
    uint64_t sums[2] = {};
    add_lines(data + at, lines, key, sums);
    if (left % kLine) {
      char rest[kLine] = {};
      std::memcpy(rest, data + at + lines * kLine, left % kLine);
      add_lines(rest, 1, key + lines * kLine, sums);
    }
    for (int i = 0; i < 2; i++)
      result[i] = horner(horner(result[i], points[i], sums[i] & 0xffffffffu), points[i], sums[i] >> 32);
  }
}

}  // namespace
