// Which tiles of keys a block visits, in which order, and what the producer tells the consumers about each.
//
// Keys come in zones, as in docs/gpu.md: those of a prefix, without positions; those far on the left, all of whose
// distances are saturated; the near ones; those far on the right. Prefix keys are tiles from key 0. The other keys are
// tiles from `key_start`, a multiple of 16, so that the eight keys which share a dropout counter never straddle tiles.
#pragma once
#include "layout.h"

namespace dk {

constexpr int kPrefixStep = 16;

// What the consumers do with a tile.
enum Zone : int {
  kPrefix = 0,
  kLeft = 1,
  kNear = 2,
  kRight = 3,
  kNearFirst = 4,  // near, and the tile before it was not visited: nothing is carried over from it
  kEnd = 5,        // no tile: the block is done
};

// Written by the producer beside the tile, 16 bytes.
struct StageInfo {
  uint32_t valid_low, valid_high;  // bit b of the pair: key b of the tile may be attended to
  int first_key;                   // of the tile, counted in the sample
  int zone;
};

// The block's place in the call.
struct Place {
  int batch, head;     // batch: sample or sequence
  int first_token;     // of the sequence, 0 unless packed
  int nq, nk;          // of the sample or sequence
  int prefix;
  int first_row;       // first query of the block, counted in the sample
};

DK_DEVICE int round_up_divide(int a, int b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }
DK_DEVICE int at_least(int value, int low) { return value < low ? low : value; }
DK_DEVICE int at_most(int value, int high) { return value > high ? high : value; }

// `blocks`: of a sample and head, `first_row` apart from which they differ is the number of this one times `rows`.
template <class Params>
DK_DEVICE Place place_of_block(const Params& p, int blocks, int rows) {
  Place place;
  const int batch_head = block_index() / blocks;
  place.batch = batch_head / (int)p.heads;
  place.head = batch_head - place.batch * (int)p.heads;
  place.first_row = (block_index() - batch_head * blocks) * rows;
  place.first_token = 0, place.nq = (int)p.nq, place.nk = (int)p.nk;
  if (p.cu_seqlens) {
    place.first_token = load_global(p.cu_seqlens + place.batch);
    place.nq = place.nk = load_global(p.cu_seqlens + place.batch + 1) - place.first_token;
  }
  place.prefix = at_most((int)p.prefix, place.nk);
  return place;
}

// The zones of one block, as ranges of tiles.
template <int D>
struct Walk {
  int prefix_tiles, tiles;     // tiles of the prefix; all tiles
  int near_start, near_stop;   // tiles [prefix_tiles, near_start) are far left, those from near_stop far right
  int key_start;

  // A tile from key j on has the distances x0 - (kTile - 1) ... x0 + kRows - 1, with x0 = first_row + prefix - j. It is
  // near unless all of them are >= high_start or all are <= low_end, so a near tile's table blocks, which start at
  // x0 - kTile and end at x0 + kRows, go less than kTableMargin rows beyond either end.
  DK_DEVICE Walk(const ForwardParams& p, const Place& place) {
    prefix_tiles = round_up_divide(place.prefix, kTile);
    key_start = place.prefix / kPrefixStep * kPrefixStep;
    const int others = place.nk > place.prefix ? round_up_divide(place.nk - key_start, kTile) : 0;
    tiles = prefix_tiles + others;
    const int x = place.first_row + place.prefix - key_start;  // distance of the first pair of the first such tile
    const int left = round_up_divide(x - (kTile - 1) - (int)p.high_start + 1, kTile);
    const int right = round_up_divide(x + Layout<D>::kRows - 1 - (int)p.low_end, kTile);
    near_start = prefix_tiles + at_most(at_least(left, 0), others);
    near_stop = prefix_tiles + at_most(at_least(right, 0), others);
  }

  DK_DEVICE int zone(int tile) const {
    return tile < prefix_tiles ? kPrefix : tile < near_start ? kLeft : tile < near_stop ? kNear : kRight;
  }
  DK_DEVICE int first_key(int tile) const {
    return tile < prefix_tiles ? tile * kTile : key_start + (tile - prefix_tiles) * kTile;
  }
};

// The barriers of both rings, of stages and of slots. `copies`: arrivals that fill a stage.
template <class L>
DK_DEVICE void initialise_barriers(uint32_t shared, int copies) {
  constexpr int kConsumerWarps = L::kConsumers * kWarpgroup / 32;
  for (int i = 0; i < L::kStages; i++) {
    barrier_init(shared + L::kStageFull + i * 8, copies);
    barrier_init(shared + L::kStageEmpty + i * 8, kConsumerWarps);
  }
  for (int i = 0; i < L::kSlots; i++) {
    barrier_init(shared + L::kSlotFull + i * 8, 1);
    barrier_init(shared + L::kSlotEmpty + i * 8, kConsumerWarps);
  }
  barrier_init_fence();
}

// A ring of barriers: position n uses entry n mod kEntries, in phase n / kEntries.
template <int kEntries>
struct RingPosition {
  int entry = 0;
  uint32_t parity = 0;

  DK_DEVICE void advance() {
    if (++entry == kEntries) entry = 0, parity ^= 1;
  }
};

}  // namespace dk
