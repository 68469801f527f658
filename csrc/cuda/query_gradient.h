// The last step of the backward: from sums of the gradients of queries, in the order of accumulators, to dq.
#pragma once
#include "backward_schedule.h"
#include "bias.h"

namespace dk {

// Convert one tile of queries; a block is one warpgroup, one block per tile.
template <class Element, int D>
DK_DEVICE void convert_queries(const BackwardParams& p) {
  const Place place = place_of_block(p, (int)p.row_tiles, kTile);
  if (place.first_row >= place.nq) return;
  const int thread = thread_index();
  const Lane lane(thread, thread / 32);
  const float* sums = p.dq_sums + query_sum(p, place, place.first_row) * kTile * D + 4 * thread;
  const int batch = p.cu_seqlens ? 0 : place.batch;
  const float scale = (float)p.scale;
  DK_UNROLL
  for (int n = 0; n < D / 8; n++) {
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      const int row = place.first_row + 16 * lane.w + 8 * h + lane.g;
      if (row >= place.nq) continue;
      const float* x = sums + n * kWarpgroup * 4 + 2 * h;
      const uint32_t pair = Element::pack(load_global(x) * scale, load_global(x + 1) * scale);
      const int64_t token = batch * p.nq + place.first_token + row;
      uint16_t* target = static_cast<uint16_t*>(p.dq) + (token * p.heads + place.head) * D + 8 * n + 2 * lane.t;
      store_global(reinterpret_cast<uint32_t*>(target), pair);
    }
  }
}

}  // namespace dk
