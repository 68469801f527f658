// Counter-based dropout: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
// Key: the seed's two halves. Counter: (key token / 8, query token, sample * heads + head, 0). The four output words
// are eight 16-bit draws, one per key token, so the mask depends neither on tiles nor on the direction of the pass.
// Hidden states are drawn for the same way, by counters (element / 8, 0, 0, 1).
#pragma once
#include "params.h"
#include "simd.h"

namespace {

constexpr int kDrawsPerRow = 24;  // a vector of 16 keys that starts anywhere touches at most 3 groups of 8

struct Dropout {
  uint32_t threshold;  // 0 = off
  float scale;
  uint64_t seed;
  bool on() const { return threshold != 0; }
};

// kV64 times eight draws from the counters (c0, c1, c2, c3); those of counter r go to draws + r * stride.
DK_INLINE void philox(const Dropout& dropout, vu64 c0, vu64 c1, vu64 c2, vu64 c3, uint16_t* draws, int64_t stride) {
  const vu64 m0 = u64_set1(0xD2511F53u), m1 = u64_set1(0xCD9E8D57u);
  uint32_t k0 = (uint32_t)dropout.seed, k1 = (uint32_t)(dropout.seed >> 32);
  for (int round = 0; round < 10; round++) {
    const vu64 p0 = u64_mul_low32(c0, m0), p1 = u64_mul_low32(c2, m1);
    c0 = u64_xor(u64_xor(u64_high(p1), c1), u64_set1(k0));
    c2 = u64_xor(u64_xor(u64_high(p0), c3), u64_set1(k1));
    c1 = p1;  // high halves are never read
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  uint64_t words[2][kV64];
  u64_store(words[0], u64_joined(c0, c1));
  u64_store(words[1], u64_joined(c2, c3));
  for (int r = 0; r < kV64; r++)
    for (int w = 0; w < 2; w++) std::memcpy(draws + r * stride + 4 * w, &words[w][r], sizeof(uint64_t));
}

// Draws of kV consecutive queries for the keys from 8 * group: draws[row][8 * offset ...].
DK_INLINE void philox_rows(const Dropout& dropout, uint64_t stream, uint64_t query, uint64_t group, uint16_t* draws) {
  for (int first = 0; first < kV; first += kV64)
    philox(dropout, u64_set1(group), u64_iota(query + first), u64_set1(stream), u64_set1(0),
           draws + first * kDrawsPerRow, kDrawsPerRow);
}

// Fill draws[kV][kDrawsPerRow] for kV queries and kV keys; key `key + c` of row r is draws[r][key % 8 + c].
DK_INLINE void draw_tile(const Dropout& dropout, uint64_t stream, int64_t query, int64_t key, uint16_t* draws) {
  const int64_t first = key >> 3, last = (key + kV - 1) >> 3;
  for (int64_t group = first; group <= last; group++)
    philox_rows(dropout, stream, (uint64_t)query, (uint64_t)group, draws + 8 * (group - first));
}

}  // namespace
