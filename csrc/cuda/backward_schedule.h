// Which keys a block of the backward holds, which tiles of queries these meet, and in which zone.
//
// Rows are keys here and columns are queries, and with distances counted from queries to keys, x' = j - i, a tile looks
// as it does in the forward: x' of row r and column c is x0 + r - c. So the tables are reversed, and pos_query is the
// table of the rows.
#pragma once
#include "backward_layout.h"
#include "schedule.h"

namespace dk {

// The block's place in the call lies in shared memory: in registers it would take those of the products.
DK_DEVICE void store_place(const Place& place, uint32_t address) {
  store_shared_4(address, (uint32_t)place.batch, (uint32_t)place.head, (uint32_t)place.first_token, (uint32_t)place.nq);
  store_shared_4(address + 16, (uint32_t)place.nk, (uint32_t)place.prefix, 0u, 0u);
}
template <int D>
DK_DEVICE Place load_place(uint32_t shared) {
  uint32_t x[8];
  load_shared_4(shared + BackwardLayout<D>::kPlace, x[0], x[1], x[2], x[3]);
  load_shared_4(shared + BackwardLayout<D>::kPlace + 16, x[4], x[5], x[6], x[7]);
  return Place{(int)x[0], (int)x[1], (int)x[2], (int)x[3], (int)x[4], (int)x[5], 0};
}

// What the consumers are told of a tile, in the place of `StageInfo::zone`: its zone, whether the block of keys
// has all that there are, and its number.
struct Visit {
  int word;
  DK_DEVICE int zone() const { return word & 7; }
  DK_DEVICE bool has_all_keys() const { return word & 8; }
  DK_DEVICE int number() const { return word >> 4; }
};

// A position in a ring, in one register where `RingPosition` takes two; kEntries is a power of two.
template <int kEntries>
struct RingCounter {
  uint32_t count = 0;
  DK_DEVICE int entry() const { return (int)(count % kEntries); }
  DK_DEVICE uint32_t parity() const { return count / kEntries & 1; }
  DK_DEVICE RingCounter next() const { return RingCounter{count + 1}; }
};

// Which of the sums of the gradients of queries, of one tile and head each, a tile adds to.
DK_DEVICE int64_t query_sum(const BackwardParams& p, const Place& place, int first_query) {
  const int64_t first_tile = p.cu_seqlens ? place.first_token / kTile + place.batch : place.batch * p.row_tiles;
  return (first_tile + first_query / kTile) * p.heads + place.head;
}

// The keys of a block. Prefix keys are blocks from key 0, the other keys blocks from `Walk::key_start` of schedule.h.
struct KeyBlock {
  int first_key;    // counted in the sample
  int start, stop;  // keys outside of these are none of the block's
  bool is_prefix;
  bool is_there;

  DK_DEVICE KeyBlock(const Place& place, int number, int keys) {
    const int prefix_blocks = round_up_divide(place.prefix, keys);
    is_prefix = number < prefix_blocks;
    first_key = is_prefix ? number * keys : place.prefix / kPrefixStep * kPrefixStep + (number - prefix_blocks) * keys;
    start = is_prefix ? 0 : place.prefix;
    stop = is_prefix ? place.prefix : place.nk;
    is_there = first_key < stop && start < stop;
  }
};

// The zones of one block of keys, as ranges of tiles of queries.
template <int D>
struct QueryWalk {
  int tiles;
  int near_start, near_stop;  // tiles before near_start are far left: their x' are large
  int x0;                     // of the first pair of tile 0
  bool is_prefix;

  // As `Walk` of the forward, whose ends change places with the sign of the distance.
  DK_DEVICE QueryWalk(const BackwardParams& p, const Place& place, const KeyBlock& block) {
    tiles = round_up_divide(place.nq, kTile);
    is_prefix = block.is_prefix;
    x0 = block.first_key - place.prefix;
    const int high_start = -(int)p.low_end, low_end = -(int)p.high_start;
    const int left = round_up_divide(x0 - (kTile - 1) - high_start + 1, kTile);
    const int right = round_up_divide(x0 + BackwardLayout<D>::kRows - 1 - low_end, kTile);
    near_start = at_most(at_least(left, 0), tiles);
    near_stop = at_most(at_least(right, 0), tiles);
  }

  DK_DEVICE int zone(int tile) const {
    return is_prefix ? kPrefix : tile < near_start ? kLeft : tile < near_stop ? kNear : kRight;
  }
};

}  // namespace dk
