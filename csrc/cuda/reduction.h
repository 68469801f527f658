// Adding a warpgroup's accumulators to sums in global memory: staged in shared memory, added by the copy engine.
//
// A sum of 64 x 64 lies in global memory as the accumulators do, so that neither staging nor copies need an order of
// their own: thread i's registers 4 j ... 4 j + 3 are floats 512 j + 4 i ... of it.
#pragma once
#include "backward_layout.h"

namespace dk {

constexpr int kChunkBytes = kWarpgroup * 4 * 4;  // 4 registers of each thread
constexpr int kHalfBytes = 4 * kChunkBytes;      // 16 registers of each thread: half of a tile's
constexpr int kHalfFloats = kHalfBytes / 4;

// Store registers of chunks kFirst ... kFirst + 3.
template <int kFirst>
DK_DEVICE void stage_half(const float (&sum)[32], uint32_t address, int thread) {
  DK_UNROLL
  for (int j = 0; j < 4; j++) {
    const float* x = sum + 4 * (kFirst + j);
    store_shared_floats(address + j * kChunkBytes + thread * 16, x[0], x[1], x[2], x[3]);
  }
}

// Add what another consumer staged.
template <int kFirst>
DK_DEVICE void add_half(float (&sum)[32], uint32_t address, int thread) {
  DK_UNROLL
  for (int j = 0; j < 4; j++) {
    float x[4];
    load_shared_floats(address + j * kChunkBytes + thread * 16, x[0], x[1], x[2], x[3]);
    DK_UNROLL
    for (int i = 0; i < 4; i++) sum[4 * (kFirst + j) + i] += x[i];
  }
}

}  // namespace dk
