// Forbidden pairs of a tile: their scores become -inf, by selection.
#pragma once
#include "bias.h"
#include "schedule.h"

namespace dk {

// Return whether some key of the tile may not be attended to.
DK_DEVICE bool is_partial(const StageInfo& info) { return (info.valid_low & info.valid_high) != 0xffffffffu; }

DK_DEVICE void mask_keys(float (&score)[32], const StageInfo& info, const Lane& lane) {
  const uint32_t valid[2] = {info.valid_low >> (2 * lane.t), info.valid_high >> (2 * lane.t)};
  DK_UNROLL
  for (int i = 0; i < 32; i++) {
    const int n = i >> 2, e = i & 1;
    if (!(valid[n >> 2] >> (8 * (n & 3) + e) & 1)) score[i] = minus_infinity();
  }
}

// One sample's and head's pair mask.
class PairMask {
 public:
  template <class Params>
  DK_DEVICE PairMask(const Params& p, const Place& place)
      : base_(p.pair_mask + place.batch * p.pair_mask_stride_b + place.head * p.pair_mask_stride_h),
        stride_m_(p.pair_mask_stride_m), stride_n_(p.pair_mask_stride_n), nq_(place.nq), nk_(place.nk) {}

  // `rows`: the queries of rows g and g + 8 of this lane's warp.
  DK_DEVICE void apply(float (&score)[32], const int (&rows)[2], int first_key, const Lane& lane) const {
    DK_UNROLL
    for (int i = 0; i < 32; i++) {
      const int n = i >> 2, h = (i >> 1) & 1, e = i & 1;
      const int row = rows[h], key = first_key + 8 * n + 2 * lane.t + e;
      if (row < nq_ && key < nk_ && !load_global(base_ + row * stride_m_ + key * stride_n_)) score[i] = minus_infinity();
    }
  }

  // Return which pairs are allowed in a tile whose rows are keys and whose columns are queries, bit i for accumulator i.
  DK_DEVICE uint32_t allowed_transposed(const int (&keys)[2], int first_query, const Lane& lane) const {
    uint32_t allowed = 0;
    DK_UNROLL
    for (int i = 0; i < 32; i++) {
      const int n = i >> 2, h = (i >> 1) & 1, e = i & 1;
      const int row = first_query + 8 * n + 2 * lane.t + e, key = keys[h];
      const bool inside = row < nq_ && key < nk_;
      allowed |= (uint32_t)(!inside || load_global(base_ + row * stride_m_ + key * stride_n_) != 0) << i;
    }
    return allowed;
  }

 private:
  const uint8_t* base_;
  int64_t stride_m_, stride_n_;
  int nq_, nk_;
};

// Zero the masked rows of a tile, so that a NaN there meets no zero probability. All threads of the consumers share the
// work; what they stored is visible to products behind a fence and once they have met.
template <int D, int kThreads>
DK_DEVICE void zero_masked_rows(uint32_t tile, const StageInfo& info, int consumer_thread) {
  constexpr int kThreadsPerRow = kThreads / kTile;
  const int row = consumer_thread / kThreadsPerRow, part = consumer_thread % kThreadsPerRow;
  const uint32_t valid = row < 32 ? info.valid_low : info.valid_high;
  if (!(valid >> (row & 31) & 1)) {
    DK_UNROLL
    for (int unit = 0; unit < kRowBytes / 16 * (D / kPanelColumns); unit += kThreadsPerRow) {
      const int u = unit + part, panel = u / (kRowBytes / 16);
      store_shared_4(tile + panel * kTile * kRowBytes + row * kRowBytes + u % (kRowBytes / 16) * 16, 0, 0, 0, 0);
    }
  }
}

template <int D>
DK_DEVICE void zero_masked_values(uint32_t values, const StageInfo& info, int consumer_thread) {
  constexpr int kThreads = Layout<D>::kConsumers * kWarpgroup;
  zero_masked_rows<D, kThreads>(values, info, consumer_thread);
  fence_async();
  sync_threads(kConsumersBarrier, kThreads);
}

}  // namespace dk
