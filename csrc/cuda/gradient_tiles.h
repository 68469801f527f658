// The backward's way through the rotation of bias.h, in both directions; rows are keys, columns queries.
//
// With y = (r - c) mod 64, the pair of row r and column c has its bias in row y of the high block where r >= c, of the
// low one elsewhere. `TileBias` brings the bias of a tile to its pairs. `GradientTiles` brings the gradients of its scores
// back to distances, as operands of products, 16 bits each:
//
//   scores   (r, c): for the gradient of the queries
//   rotated  (r, y), a ring of two: for the gradients of the table of rows, and what its blocks add to those of the keys.
//            Of one block, y <= r comes from the tile that has it as high block and y > r from the tile before, which had
//            it as low block. So a block is complete after the first, and one product serves both.
//   columns  (c, y), one for the high block and one for the low: for the gradients of the table of columns, and what its
//            blocks add to those of the queries. The first holds y < 64 - c, the second the rest; other elements stay 0.
#pragma once
#include "backward_layout.h"
#include "bias.h"

namespace dk {

// Adds the term of the rows to `SharedFrame`, which holds that of the columns: (r, c) from both products of the rows, in
// a second frame that is only read by the warp that wrote it. That frame lies in two halves, of two warps each.
template <class Element>
class TileBias : public SharedFrame<Staging<Element, 4>, false> {
  using S = Staging<Element, 4>;

 public:
  // `frame`: of the columns; the other one lies at `lower` for warps 0 and 1, at `upper` for the others.
  DK_DEVICE TileBias(const Lane& lane, uint32_t frame, uint32_t lower, uint32_t upper)
      : SharedFrame<S, false>(lane, frame),
        own_((lane.w < 2 ? lower : upper) + (lane.w & 1) * 2 * S::kFrameRowBytes),
        load_(own_ + lane.g * S::kBlockRowBytes + 2 * lane.t * S::kNumber) {
    DK_UNROLL
    for (int e = 0; e < 2; e++) {
      const int column = query_of_row(lane.g) - 2 * lane.t - e;  // 16 w + 8 (h - n) come later
      block_[e] = (2 * lane.w + (column >> 3)) * S::kBlockBytes;
      store_[e] = own_ + lane.g * S::kBlockRowBytes + (column & 7) * S::kNumber;
    }
  }

  // Store the products of the rows with the high and with the low block.
  DK_DEVICE void store_rows(const float (&high)[32], const float (&low)[32]) const {
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float value[2];
        uint32_t address[2];
        DK_UNROLL
        for (int e = 0; e < 2; e++) {
          const uint32_t block = block_[e] + (h - n) * S::kBlockBytes;  // below 0 where c > r
          const int i = 4 * n + 2 * h + e;
          const bool is_low = block & 8 * S::kBlockBytes;
          value[e] = is_low ? low[i] : high[i];
          address[e] = store_[e] + (block & 7 * S::kBlockBytes) + h * S::kFrameRowBytes;
        }
        S::store(address[0], address[1], value[0], value[1]);
      }
    }
  }

  // Load the sum of both terms in the place of the scores.
  DK_DEVICE void load(float (&score)[32]) const { S::load_sum(load_, S::kFrameRowBytes, this->frame_load_, score); }

 private:
  uint32_t own_, load_, block_[2], store_[2];
};

// Store a tile of 64 x 64 pairs, given as the first operand of a product, as an operand in shared memory.
DK_DEVICE void store_scores(const uint32_t (&pairs)[16], const Lane& lane, uint32_t tile) {
  const uint32_t target = tile + (16 * lane.w + lane.g) * kRowBytes + lane.g * 16 + lane.t * 4;
  DK_UNROLL
  for (int i = 0; i < 16; i++) store_shared((target ^ (i >> 1) * 16) + (i & 1) * 8 * kRowBytes, pairs[i]);
}

// `pairs`, in what follows, are the gradients of scores as the first operand of a product.
class GradientTiles {
  static constexpr int kPairs = kTile * kTile * 2;  // bytes of one

 public:
  // `rotated` and `columns` are of two tiles each. `current`: from `rotated` to the tile that is complete with this one.
  DK_DEVICE GradientTiles(const Lane& lane, uint32_t rotated, uint32_t columns, uint32_t current)
      : rotated_(rotated + (16 * lane.w + lane.g) * kRowBytes), columns_(columns + 2 * lane.t * kRowBytes),
        current_(current), g_(lane.g * 16), t_(2 * lane.t * 16) {
    DK_UNROLL
    for (int e = 0; e < 2; e++) {
      const int y = query_of_row(lane.g) - 2 * lane.t - e;  // 16 w + 8 (h - n) come later
      unit_[e] = (2 * lane.w + (y >> 3)) * 16;
      inside_[e] = (y & 7) * 2;
    }
  }

  // Store them in `rotated` and in `columns`. One after the other: addresses for all of them would not fit in registers.
  DK_DEVICE void store(const uint32_t (&pairs)[16]) const {
    DK_UNROLL
    for (int step = 0; step < 9; step++) {
      DK_UNROLL
      for (int e = 0; e < 2; e++) {
        const uint32_t y = computed_anew(unit_[e] + (1 - step) * 16);  // unit of 8 distances; below 0 where c > r
        const uint32_t low = (y & 8 * 16) * (kPairs / (8 * 16));       // from a tile of the high block to the other
        const uint32_t row = rotated_ + inside_[e] + (low ^ current_) + ((y & 7 * 16) ^ g_);
        const uint32_t column = columns_ + inside_[e] + low + ((y & 7 * 16) ^ (t_ + e * 16));
        DK_UNROLL
        for (int h = 0; h < 2; h++) {
          const int n = step - 1 + h;
          if (n < 0 || n > 7) continue;
          const uint32_t value = e ? pairs[2 * n + h] >> 16 : pairs[2 * n + h];
          store_shared_half(row + h * 8 * kRowBytes, value);
          store_shared_half(column + (8 * n + e) * kRowBytes, value);
        }
      }
    }
  }

 private:
  uint32_t rotated_, columns_, current_, g_, t_, unit_[2], inside_[2];
};

}  // namespace dk
