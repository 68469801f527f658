// The dropout counter of deberta_kernels/dropout.py: Philox4x32-10, eight keys per call.
#pragma once
#include "bias.h"

namespace dk {

// Run Philox on the counter (group, row, batch_head, 0), in place.
DK_DEVICE void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
  DK_UNROLL
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = (uint64_t)c[0] * 0xD2511F53u, product1 = (uint64_t)c[2] * 0xCD9E8D57u;
    c[0] = (uint32_t)(product1 >> 32) ^ c[1] ^ key0;
    c[1] = (uint32_t)product1;
    c[2] = (uint32_t)(product0 >> 32) ^ c[3] ^ key1;
    c[3] = (uint32_t)product0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

// Transpose a 4 x 4 matrix of words spread over four lanes, a row each: lane t of four that are kStride lanes apart.
template <int kStride>
DK_DEVICE void transpose_quad(uint32_t (&words)[4], int t) {
  DK_UNROLL
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = t & step;
    DK_UNROLL
    for (int i = 0; i < 2; i++) {
      const int a = step == 1 ? 2 * i : i, b = a + step;
      const uint32_t received = shuffle_xor(upper ? words[a] : words[b], step * kStride);
      if (upper) words[a] = received;
      else words[b] = received;
    }
  }
}

// Drop exponentials of a tile. Keys 8 n ... 8 n + 7 of a row share one call; of the four lanes of a row each makes the
// calls of two groups n, and they exchange words.
DK_DEVICE void drop(
    float (&score)[32], int64_t seed, uint32_t batch_head, const int (&rows)[2], int first_key, uint32_t threshold,
    const Lane& lane) {
  DK_UNROLL
  for (int h = 0; h < 2; h++) {
    DK_UNROLL
    for (int half = 0; half < 2; half++) {
      uint32_t words[4] = {(uint32_t)(first_key >> 3) + 4 * half + lane.t, (uint32_t)rows[h], batch_head, 0};
      philox(words, (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32));
      transpose_quad<1>(words, lane.t);
      DK_UNROLL
      for (int k = 0; k < 4; k++) {
        float* pair = score + 4 * (4 * half + k) + 2 * h;
        if ((words[k] & 0xffffu) < threshold) pair[0] = 0.0f;
        if (words[k] >> 16 < threshold) pair[1] = 0.0f;
      }
    }
  }
}

// The same for a tile whose rows are keys, in the order of `query_of_row`, and whose columns are queries; returns which
// pairs are kept, bit i for accumulator i. The eight rows of a group share a call per column; of the lanes g each makes
// the calls of the columns 8 g + 2 t + e.
DK_DEVICE uint32_t kept_pairs(
    int64_t seed, uint32_t batch_head, int first_key, int first_query, uint32_t threshold, const Lane& lane) {
  uint32_t kept = 0;
  DK_UNROLL
  for (int i = 0; i < 4; i++) {
    const int h = i >> 1, e = i & 1;
    uint32_t words[4] = {
        (uint32_t)(first_key >> 3) + 2 * lane.w + h, (uint32_t)(first_query + 8 * lane.g + 2 * lane.t + e), batch_head, 0};
    philox(words, (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32));
    transpose_quad<4>(words, lane.g & 3);
    DK_UNROLL
    for (int k = 0; k < 4; k++) {
      // Word g & 3 of the calls of lanes k and k + 4; the row is key 2 (g & 3) + (g >> 2) of the group.
      const uint32_t other = shuffle_xor(words[k], 16);
      const uint32_t own = words[k] >> 16 * (lane.g >> 2) & 0xffffu, far = other >> 16 * (lane.g >> 2) & 0xffffu;
      const uint32_t lower = lane.g < 4 ? own : far, upper = lane.g < 4 ? far : own;
      kept |= (uint32_t)(lower >= threshold) << (4 * k + 2 * h + e);
      kept |= (uint32_t)(upper >= threshold) << (4 * (k + 4) + 2 * h + e);
    }
  }
  return kept;
}

}  // namespace dk
