// The online softmax of a warpgroup's 64 queries; each lane holds two of them, rows g and g + 8 of its warp.
#pragma once
#include "mask.h"

namespace dk {

// Maximum so far, and this lane's share of the sum of exponentials so far; both in units of log2, scaled.
struct Statistics {
  float maximum[2] = {minus_infinity(), minus_infinity()};
  float total[2] = {0.0f, 0.0f};
};

// A row of a tile is spread over four neighbouring lanes.
DK_DEVICE float largest_of_row(float x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}
DK_DEVICE float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Turn scores into exponentials; `correction` is what earlier exponentials must be multiplied by.
DK_DEVICE void exponentials(float (&score)[32], Statistics& statistics, float qk_scale, float (&correction)[2]) {
  DK_UNROLL
  for (int h = 0; h < 2; h++) {
    float row[4];  // four chains instead of one
    DK_UNROLL
    for (int i = 0; i < 16; i++) {
      const float x = score[4 * (i >> 1) + 2 * h + (i & 1)];
      row[i & 3] = i < 4 ? x : larger(row[i & 3], x);
    }
    const float tile = largest_of_row(larger(larger(row[0], row[1]), larger(row[2], row[3])));
    const float maximum = larger(statistics.maximum[h], tile * qk_scale);
    // Without any key so far: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    const float base = maximum == minus_infinity() ? 0.0f : maximum;
    correction[h] = exp2_fast(statistics.maximum[h] - base);
    statistics.maximum[h] = maximum;
    float sum[2] = {0.0f, 0.0f};
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int e = 0; e < 2; e++) {
        float& x = score[4 * n + 2 * h + e];
        x = exp2_fast(multiply_add(x, qk_scale, -base));
        sum[e] += x;
      }
    }
    statistics.total[h] = statistics.total[h] * correction[h] + (sum[0] + sum[1]);
  }
}

// Round exponentials to operands of a product: accumulators of two 8-column groups are the fragment of 16 columns.
template <class Element>
DK_DEVICE void to_operand(const float (&score)[32], uint32_t (&operand)[16]) {
  DK_UNROLL
  for (int i = 0; i < 16; i++) operand[i] = Element::pack(score[2 * i], score[2 * i + 1]);
}

}  // namespace dk
