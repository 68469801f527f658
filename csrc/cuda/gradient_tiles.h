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
class TileBias : public SharedFrame<true> {
 public:
  DK_DEVICE TileBias(const Lane& lane, uint32_t frame_address) : SharedFrame<true>(lane, frame_address), w_(lane.w) {
    load_ = lane.g * kBlockRowBytes + 2 * lane.t * 4;
    DK_UNROLL
    for (int e = 0; e < 2; e++) {
      const int column = query_of_row(lane.g) - 2 * lane.t - e;  // 16 w + 8 (h - n) come later
      block_[e] = (2 * lane.w + (column >> 3)) * kBlockBytes;
      inside_[e] = lane.g * kBlockRowBytes + (column & 7) * 4;
    }
  }

  // Store the products of the rows with the high and with the low block. `half`: of two warps.
  DK_DEVICE void store_rows(const float (&high)[32], const float (&low)[32], uint32_t half) const {
    const uint32_t target[2] = {half + computed_anew(inside_[0]), half + computed_anew(inside_[1])};
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        DK_UNROLL
        for (int e = 0; e < 2; e++) {
          const uint32_t block = block_[e] + (h - n) * kBlockBytes;  // below 0 where c > r
          const int i = 4 * n + 2 * h + e;
          const bool is_low = block & 8 * kBlockBytes;
          store_shared(target[e] + (block & 7 * kBlockBytes) + h * kFrameRowBytes, is_low ? low[i] : high[i]);
        }
      }
    }
  }

  // Load the sum of both terms in the place of the scores.
  DK_DEVICE void load(float (&score)[32], uint32_t half) const {
    const uint32_t own = half + load_;
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float a, b, c, d;
        load_shared_2(own + h * kFrameRowBytes + n * kBlockBytes, a, b);
        load_shared_2(frame_load_ + h * kFrameRowBytes + n * kBlockBytes, c, d);
        score[4 * n + 2 * h] = a + c;
        score[4 * n + 2 * h + 1] = b + d;
      }
    }
  }

  // Return where this warp's part of the frame is, the frame being at `lower` for warps 0 and 1, at `upper` for others.
  DK_DEVICE uint32_t half(uint32_t lower, uint32_t upper) const {
    return (w_ < 2 ? lower : upper) + (w_ & 1) * 2 * kFrameRowBytes;
  }

 private:
  int w_;
  uint32_t load_, block_[2], inside_[2];
};

class GradientTiles {
  static constexpr int kPairs = kTile * kTile * 2;  // bytes of one

 public:
  // `rotated` and `columns` are of two tiles each.
  DK_DEVICE GradientTiles(const Lane& lane, uint32_t scores, uint32_t rotated, uint32_t columns)
      : scores_(scores + (16 * lane.w + lane.g) * kRowBytes + lane.g * 16 + lane.t * 4), rotated_(rotated),
        rotated_row_(rotated + (16 * lane.w + lane.g) * kRowBytes), columns_row_(columns + 2 * lane.t * kRowBytes),
        g_(lane.g * 16), t_(2 * lane.t * 16) {
    DK_UNROLL
    for (int e = 0; e < 2; e++) {
      const int y = query_of_row(lane.g) - 2 * lane.t - e;  // 16 w + 8 (h - n) come later
      unit_[e] = (2 * lane.w + (y >> 3)) * 16;
      inside_[e] = (y & 7) * 2;
    }
  }

  // Where the block that is complete after this tile lies, and the one that the next tile completes.
  DK_DEVICE uint32_t complete() const { return rotated_ + current_; }
  DK_DEVICE uint32_t begun() const { return rotated_ + (current_ ^ kPairs); }
  DK_DEVICE void advance() { current_ ^= kPairs; }

  // `pairs`: the gradients of the scores as an operand of a product.
  DK_DEVICE void store_scores(const uint32_t (&pairs)[16]) const {
    DK_UNROLL
    for (int i = 0; i < 16; i++) store_shared((scores_ ^ (i >> 1) * 16) + (i & 1) * 8 * kRowBytes, pairs[i]);
  }

  DK_DEVICE void store_rotated(const uint32_t (&pairs)[16]) const {
    const uint32_t unit[2] = {computed_anew(unit_[0]), computed_anew(unit_[1])};
    DK_UNROLL
    for (int i = 0; i < 32; i++) {
      const int n = i >> 2, h = (i >> 1) & 1, e = i & 1;
      const uint32_t y = unit[e] + (h - n) * 16;  // unit of 8 distances; below 0 where c > r
      const uint32_t tile = ((y & 8 * 16) * (kPairs / (8 * 16))) ^ current_;
      const uint32_t value = e ? pairs[i >> 1] >> 16 : pairs[i >> 1];
      store_shared_half(rotated_row_ + inside_[e] + tile + ((y & 7 * 16) ^ g_) + h * 8 * kRowBytes, value);
    }
  }

  DK_DEVICE void store_columns(const uint32_t (&pairs)[16]) const {
    const uint32_t unit[2] = {computed_anew(unit_[0]), computed_anew(unit_[1])};
    DK_UNROLL
    for (int i = 0; i < 32; i++) {
      const int n = i >> 2, h = (i >> 1) & 1, e = i & 1;
      const uint32_t y = unit[e] + (h - n) * 16;
      const uint32_t tile = (y & 8 * 16) * (kPairs / (8 * 16));
      const uint32_t value = e ? pairs[i >> 1] >> 16 : pairs[i >> 1];
      const uint32_t row = columns_row_ + inside_[e] + (8 * n + e) * kRowBytes;
      store_shared_half(row + tile + ((y & 7 * 16) ^ (t_ + e * 16)), value);
    }
  }

 private:
  uint32_t scores_, rotated_, rotated_row_, columns_row_, g_, t_, unit_[2], inside_[2];
  uint32_t current_ = 0;
};

}  // namespace dk
