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

// Transpose a 4 x 4 matrix of words spread over four neighbouring lanes, a row each.
DK_DEVICE void transpose_quad(uint32_t (&words)[4], int t) {
  DK_UNROLL
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = t & step;
    DK_UNROLL
    for (int i = 0; i < 2; i++) {
      const int a = step == 1 ? 2 * i : i, b = a + step;
      const uint32_t received = shuffle_xor(upper ? words[a] : words[b], step);
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
      transpose_quad(words, lane.t);
      DK_UNROLL
      for (int k = 0; k < 4; k++) {
        float* pair = score + 4 * (4 * half + k) + 2 * h;
        if ((words[k] & 0xffffu) < threshold) pair[0] = 0.0f;
        if (words[k] >> 16 < threshold) pair[1] = 0.0f;
      }
    }
  }
}

}  // namespace dk
