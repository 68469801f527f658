// One block of the forward: who is who.
#pragma once
#include "consumer.h"
#include "producer.h"

namespace dk {

// Attend with the queries of this block. The first warpgroup copies, of which one warp is enough; each of the others
// computes 64 rows.
template <class Element, int D, bool kPair, bool kDropout>
DK_DEVICE void forward(const ForwardParams& p) {
  using L = Layout<D>;
  const Place place = place_of_block(p, (int)p.row_tiles, L::kRows);
  if (place.first_row >= place.nq) return;
  const uint32_t shared = shared_base();
  const int thread = thread_index(), warp = uniform(thread / 32), warpgroup = warp / 4;
  if (thread == 0) initialise_barriers<L>(shared, 1);
  sync_block();
  if (warpgroup == 0) {
    if (L::kConsumers > 1) give_registers<L::kProducerRegisters>();
    if (warp == 0) Producer<D>(p, place, shared, thread).run();
  } else {
    if (L::kConsumers > 1) take_registers<L::kConsumerRegisters>();
    Consumer<Element, D, kPair, kDropout>(p, place, shared, warpgroup - 1, thread % kWarpgroup, warp % 4).run();
  }
}

}  // namespace dk
