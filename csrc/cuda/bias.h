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
// A frame holds one number per pair, in the place of the pair: blocks of 8 queries by 8 keys, in a block rows of 8 keys.
// Rounded terms take 16 bits in the forward; the backward has no registers for that.
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

// Sizes in a frame, and its accesses. `kBytes` of a number: 2 or 4.
template <class Element, int kBytes>
struct Staging {
  static constexpr int kNumber = kBytes;
  static constexpr int kBlockRowBytes = 8 * kBytes;         // 8 keys of a query
  static constexpr int kBlockBytes = 8 * kBlockRowBytes;    // 8 x 8 pairs
  static constexpr int kFrameRowBytes = 8 * kBlockBytes;    // 8 queries by 64 keys
  static constexpr int kRingRowBytes = 2 * kFrameRowBytes;  // the same in both frames of a ring

  // Store the two numbers of neighbouring columns of an accumulator.
  DK_DEVICE static void store(uint32_t even, uint32_t odd, float a, float b) {
    if (kBytes == 2) {
      const uint32_t pair = Element::pack(a, b);
      store_shared_half(even, pair);
      store_shared_half(odd, pair >> 16);
    } else {
      store_shared(even, rounded(a));
      store_shared(odd, rounded(b));
    }
  }

  DK_DEVICE static float rounded(float value) {
    if (!Element::kRoundsBias) return value;
    float low, high;
    Element::unpack(Element::pack(value, 0.0f), low, high);
    return low;
  }

  // Load two neighbours.
  DK_DEVICE static void load(uint32_t address, float& a, float& b) {
    if (kBytes == 2) {
      Element::unpack(load_shared(address), a, b);
    } else {
      load_shared_2(address, a, b);
    }
  }

  // Load the sum of the terms in two frames, in the place of the scores.
  DK_DEVICE static void load_sum(uint32_t first, uint32_t first_rows, uint32_t second, float (&score)[32]) {
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float a, b, c, d;
        load(first + h * first_rows + n * kBlockBytes, a, b);
        load(second + h * kFrameRowBytes + n * kBlockBytes, c, d);
        score[4 * n + 2 * h] = a + c;
        score[4 * n + 2 * h + 1] = b + d;
      }
    }
  }
};

// The frame of p2c, and the address arithmetic of one lane in it; in the backward, whose rows are keys, that of c2p.
// `kFewRegisters`: compute addresses for each tile instead of keeping them.
template <class S, bool kFewRegisters>
class SharedFrame {
 public:
  DK_DEVICE SharedFrame(const Lane& lane, uint32_t frame_address)
      : frame_load_(frame_address + 2 * lane.w * S::kFrameRowBytes + lane.g * S::kBlockRowBytes +
                    2 * lane.t * S::kNumber) {
    DK_UNROLL
    for (int e = 0; e < 2; e++) {
      // query = 16 w + 8 h + g + 8 n + 2 t + e: `frame_row_` its group of 8, not yet mod 8, as an offset.
      const int query = lane.g + 2 * lane.t + e;
      frame_row_[e] = (2 * lane.w + (query >> 3)) * S::kFrameRowBytes;
      frame_store_[e] = frame_address + 2 * lane.w * S::kBlockBytes + row_of_query(query & 7) * S::kBlockRowBytes +
                        lane.g * S::kNumber;
    }
  }

  // Store the product of the keys with the high and with the low block.
  DK_DEVICE void store_p2c(const float (&high)[32], const float (&low)[32]) const {
    const uint32_t first_row[2] = {per_tile(frame_row_[0]), per_tile(frame_row_[1])};
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float value[2];
        uint32_t address[2];
        DK_UNROLL
        for (int e = 0; e < 2; e++) {
          const uint32_t row = first_row[e] + (n + h) * S::kFrameRowBytes;
          const int i = 4 * n + 2 * h + e;
          const bool is_low = row & 8 * S::kFrameRowBytes;
          value[e] = is_low ? low[i] : high[i];
          address[e] = frame_store_[e] + (row & 7 * S::kFrameRowBytes) + h * S::kBlockBytes;
        }
        S::store(address[0], address[1], value[0], value[1]);
      }
    }
  }

 protected:
  DK_DEVICE static uint32_t per_tile(uint32_t value) { return kFewRegisters ? computed_anew(value) : value; }

  uint32_t frame_load_, frame_row_[2], frame_store_[2];
};

// Both frames of the forward. Bit `kFrameRowBytes` of an offset in a row of the ring says in which of the two frames it
// is, so exchanging the frames is one XOR.
template <class S, bool kFewRegisters>
class BiasFrames : public SharedFrame<S, kFewRegisters> {
 public:
  DK_DEVICE BiasFrames(const Lane& lane, uint32_t ring_address, uint32_t frame_address)
      : SharedFrame<S, kFewRegisters>(lane, frame_address), ring_(ring_address + 2 * lane.w * S::kRingRowBytes),
        ring_load_(lane.g * S::kBlockRowBytes + 2 * lane.t * S::kNumber) {
    DK_UNROLL
    for (int e = 0; e < 2; e++) {
      // c' = 16 w + 8 h + query_of_row(g) - (8 n + 2 t + e) + 64, in blocks of 8 keys; n and h are added later.
      const int key = query_of_row(lane.g) - 2 * lane.t - e;
      ring_store_[e] =
          (8 + 2 * lane.w + (key >> 3)) * S::kBlockBytes + lane.g * S::kBlockRowBytes + (key & 7) * S::kNumber;
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
        uint32_t address[2];
        DK_UNROLL
        for (int e = 0; e < 2; e++) {
          const uint32_t offset = (store[e] + (h - n) * S::kBlockBytes) ^ current_;
          address[e] = ring_ + offset + h * S::kRingRowBytes;
        }
        S::store(address[0], address[1], product[4 * n + 2 * h], product[4 * n + 2 * h + 1]);
      }
    }
  }

  // Load the sum of both terms in the place of the scores.
  DK_DEVICE void load(float (&score)[32]) const {
    S::load_sum(ring_ + (ring_load_ ^ current_), S::kRingRowBytes, this->frame_load_, score);
  }

  // The next tile's frame becomes this tile's.
  DK_DEVICE void advance() { current_ ^= S::kFrameRowBytes; }

 private:
  uint32_t ring_;         // the first row of this warp
  uint32_t current_ = 0;  // of the ring: which frame is this tile's
  uint32_t ring_load_, ring_store_[2];
};

}  // namespace dk
