// Dropout of hidden states in one pass with the residual that follows. The backward draws again: nothing is kept.
#pragma once
#include <algorithm>

#include "dropout.h"
#include "element.h"
#include "parallel.h"

namespace {

static bool drop_hidden(const DropoutParams& p) {
  constexpr int kDrawn = 8 * kV64;  // elements, a whole number of vectors
  constexpr int64_t kTask = 256 * kDrawn;
  const Dropout dropout{(uint32_t)p.threshold, (float)p.scale, (uint64_t)p.seed};
  return run_tasks((p.count + kTask - 1) / kTask, p.threads, 64, [&](int64_t task, char*) {
    const int64_t end = std::min(p.count, (task + 1) * kTask);
    for (int64_t n = task * kTask; n < end; n += kDrawn) {
      const int count = (int)std::min<int64_t>(kDrawn, end - n);
      uint16_t draws[kDrawn];
      philox(dropout, u64_iota(n / 8), u64_set1(0), u64_set1(0), u64_set1(1), draws, 8);
      float x[kDrawn] = {}, residual[kDrawn] = {};
      read_floats(static_cast<const char*>(p.x) + n * bytes_of(p.x_dtype), p.x_dtype, count, x);
      if (p.residual)
        read_floats(static_cast<const char*>(p.residual) + n * bytes_of(p.residual_dtype), p.residual_dtype, count,
                    residual);
      for (int c = 0; c < kDrawn; c += kV)
        store(x + c, fma(load(x + c), keep_factor(draws + c, dropout.threshold, dropout.scale), load(residual + c)));
      write_floats(x, count, p.out_dtype, static_cast<char*>(p.out) + n * bytes_of(p.out_dtype));
    }
  });
}

}  // namespace
