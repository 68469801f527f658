// A checksum of memory that tells whether a weight is still what it was: read once, at the speed of memory.
#pragma once
#include "simd.h"

namespace {

using Lanes = uint64_t __attribute__((vector_size(sizeof(vf))));
constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);

// Every step is a bijection of what was there before it, so that a change of a single word always changes the result.
// Bits travel both ways, or two changes of sign could cancel each other; shifts because most vectors have no product
// of 64 bits.
template <class T>
DK_INLINE T mixed(T sum, T word) {
  sum ^= word;
  sum += sum << 21;
  return sum ^ sum >> 29;
}

static uint64_t checksum(const char* data, int64_t bytes) {
  constexpr int kSums = 4;  // independent, to hide the latency of a step
  Lanes sums[kSums] = {};
  int64_t at = 0;
  for (; at + (int64_t)sizeof sums <= bytes; at += sizeof sums) {
    DK_UNROLL
    for (int s = 0; s < kSums; s++) {
      Lanes words;
      std::memcpy(&words, data + at + s * sizeof words, sizeof words);
      sums[s] = mixed(sums[s], words);
    }
  }
  uint64_t result = bytes;
  for (; at < bytes; at += sizeof result) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, bytes - at < (int64_t)sizeof word ? bytes - at : sizeof word);
    result = mixed(result, word);
  }
  for (int s = 0; s < kSums; s++)
    for (int c = 0; c < kLanes; c++) result = mixed(result, (uint64_t)sums[s][c]);
  return result;
}

}  // namespace
