// The position bias of a near tile: two products with blocks of table rows, read back along diagonals.
//
// With x0 the distance of a warpgroup's first pair, the pair of query r and key c has distance x0 + r - c. The high
// block holds the table rows of distances x0 ... x0 + 63, the low block those of x0 - 64 ... x0 - 1.
//
//   c2p  query r times row y of the low block belongs to c' = r - y + 64: key c' of this tile, or key c' - 64 of the
//        next one, whose high block this one is. One product per tile therefore suffices. It is stored into a ring of
//        two frames, this tile's and the next one's, and only ever read by the warp that wrote it.
//   p2c  key c times row y belongs to query (c + y) mod 64, by the high block where c + y < 64, else by the low one.
//        Two products, selected in registers, stored into one frame that all warps of the warpgroup share.
//
// A frame holds one float per pair, in the place of the pair: blocks of 8 queries by 8 keys, in a block rows of 8 keys.
// Both stores scatter along diagonals; the load is then that of a plain tile. For no store or load to meet two words of
// one bank, row g of an 8-row group of the accumulators is query `query_of_row(g)` of the group, and that is also the
// order of rows in a block.
#pragma once
#include "layout.h"

namespace dk {

// Lane 4 * g + t of warp w holds rows 16 * w + 8 * h + g and columns 8 * n + 2 * t + e of a tile.
struct Lane {
  int w, g, t;
  DK_DEVICE Lane(int thread, int warp) : w(warp), g((thread & 31) >> 2), t(thread & 3) {}
};

// Rows g and g + 4 would share banks; they get queries of different parity, so that along a diagonal their columns have
// different parity too.
DK_DEVICE int query_of_row(int g) { return 2 * (g & 3) + (g >> 2); }
DK_DEVICE int row_of_query(int query) { return (query >> 1) + 4 * (query & 1); }

constexpr int kBlockRowBytes = 8 * 4;              // 8 keys of a query
constexpr int kBlockBytes = 8 * kBlockRowBytes;    // 8 x 8 pairs
constexpr int kFrameRowBytes = 8 * kBlockBytes;    // 8 queries by 64 keys
constexpr int kRingRowBytes = 2 * kFrameRowBytes;  // the same in both frames of a ring

// The frame of p2c, and the address arithmetic of one lane in it; in the backward, whose rows are keys, that of c2p.
// `kFewRegisters`: compute addresses for each tile instead of keeping them.
template <bool kFewRegisters>
class SharedFrame {
 public:
  DK_DEVICE SharedFrame(const Lane& lane, uint32_t frame_address)
      : frame_load_(frame_address + 2 * lane.w * kFrameRowBytes + lane.g * kBlockRowBytes + 2 * lane.t * 4) {
    DK_UNROLL
    for (int e = 0; e < 2; e++) {
      // query = 16 w + 8 h + g + 8 n + 2 t + e: `frame_row_` its group of 8, not yet mod 8, as an offset.
      const int query = lane.g + 2 * lane.t + e;
      frame_row_[e] = (2 * lane.w + (query >> 3)) * kFrameRowBytes;
      frame_store_[e] = frame_address + 2 * lane.w * kBlockBytes + row_of_query(query & 7) * kBlockRowBytes + lane.g * 4;
    }
  }

  // Store the product of the keys with the high and with the low block.
  DK_DEVICE void store_p2c(const float (&high)[32], const float (&low)[32]) const {
    const uint32_t first_row[2] = {per_tile(frame_row_[0]), per_tile(frame_row_[1])};
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        DK_UNROLL
        for (int e = 0; e < 2; e++) {
          const uint32_t row = first_row[e] + (n + h) * kFrameRowBytes;
          const int i = 4 * n + 2 * h + e;
          const bool is_low = row & 8 * kFrameRowBytes;
          store_shared(frame_store_[e] + (row & 7 * kFrameRowBytes) + h * kBlockBytes, is_low ? low[i] : high[i]);
        }
      }
    }
  }

 protected:
  DK_DEVICE static uint32_t per_tile(uint32_t value) { return kFewRegisters ? computed_anew(value) : value; }

  uint32_t frame_load_, frame_row_[2], frame_store_[2];
};

// Both frames of the forward. Bit `kFrameRowBytes` of an offset in a row of the ring says in which of the two frames it
// is, so exchanging the frames is one XOR.
template <bool kFewRegisters>
class BiasFrames : public SharedFrame<kFewRegisters> {
 public:
  DK_DEVICE BiasFrames(const Lane& lane, uint32_t ring_address, uint32_t frame_address)
      : SharedFrame<kFewRegisters>(lane, frame_address), ring_(ring_address + 2 * lane.w * kRingRowBytes),
        ring_load_(lane.g * kBlockRowBytes + 2 * lane.t * 4) {
    DK_UNROLL
    for (int e = 0; e < 2; e++) {
      // c' = 16 w + 8 h + query_of_row(g) - (8 n + 2 t + e) + 64, in blocks of 8 keys; n and h are added later.
      const int key = query_of_row(lane.g) - 2 * lane.t - e;
      ring_store_[e] = (8 + 2 * lane.w + (key >> 3)) * kBlockBytes + lane.g * kBlockRowBytes + (key & 7) * 4;
    }
  }

  // Store the product of the queries with a low block.
  DK_DEVICE void store_c2p(const float (&product)[32]) const {
    const uint32_t store[2] = {this->per_tile(ring_store_[0]), this->per_tile(ring_store_[1])};
    sync_warp();  // every lane has loaded what this overwrites, a part of the tile before
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        DK_UNROLL
        for (int e = 0; e < 2; e++) {
          const uint32_t offset = (store[e] + (h - n) * kBlockBytes) ^ current_;
          store_shared(ring_ + offset + h * kRingRowBytes, product[4 * n + 2 * h + e]);
        }
      }
    }
  }

  // Load the sum of both terms in the place of the scores.
  DK_DEVICE void load(float (&score)[32]) const {
    const uint32_t ring = ring_ + (ring_load_ ^ current_);
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float a, b, c, d;
        load_shared_2(ring + h * kRingRowBytes + n * kBlockBytes, a, b);
        load_shared_2(this->frame_load_ + h * kFrameRowBytes + n * kBlockBytes, c, d);
        score[4 * n + 2 * h] = a + c;
        score[4 * n + 2 * h + 1] = b + d;
      }
    }
  }

  // The next tile's frame becomes this tile's.
  DK_DEVICE void advance() { current_ ^= kFrameRowBytes; }

 private:
  uint32_t ring_;         // the first row of this warp
  uint32_t current_ = 0;  // of the ring: which frame is this tile's
  uint32_t ring_load_, ring_store_[2];
};

}  // namespace dk
