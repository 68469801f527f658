// One block of the backward: who is who.
#pragma once
#include "key_consumer.h"
#include "query_gradient.h"

namespace dk {

// Differentiate by the keys of this block, of every `groups`-th block of a sample and head. The first warpgroup copies, of
// which one warp is enough; each of the others holds 64 keys.
template <class Element, int D, bool kPair, bool kDropout>
DK_DEVICE void backward(const BackwardParams& p) {
  using L = BackwardLayout<D>;
  Place place = place_of_block(p, (int)p.groups, 1);
  if (p.cu_seqlens) {
    // Should a sequence be longer than the host was told, it ends with its tiles: there is no place for more sums.
    place.nq = place.nk = at_most(place.nq, (int)p.row_tiles * kTile);
    place.prefix = at_most(place.prefix, place.nk);
  }
  const int thread = thread_index(), warp = uniform(thread / 32), warpgroup = warp / 4;
  const int first = place.first_row;
  if (!KeyBlock(place, first, L::kRows).is_there) return;
  const uint32_t shared = shared_base();
  if (thread == 0) {
    initialise_barriers<L>(shared, 2);  // copies, and what the producer stores itself
    store_place(place, shared + L::kPlace);
  }
  sync_block();
  if (warpgroup == 0) {
    give_registers<L::kProducerRegisters>();
    if (warp != 0) return;
    QueryProducer<D> producer(p, shared, thread);
    for (int number = first; KeyBlock(load_place<D>(shared), number, L::kRows).is_there; number += (int)p.groups) {
      producer.run(number);
    }
  } else {
    take_registers<L::kConsumerRegisters>();
    KeyConsumer<Element, D, kPair, kDropout> consumer(p, shared, warpgroup - 1, thread % kWarpgroup);
    int number;
    do number = consumer.run() + (int)p.groups;
    while (KeyBlock(load_place<D>(shared), number, L::kRows).is_there);
    consumer.leave();
  }
}

}  // namespace dk
