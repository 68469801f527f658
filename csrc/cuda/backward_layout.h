// Sizes of the backward's tiles and where they lie in shared memory.
#pragma once
#include "layout.h"

namespace dk {

template <int D>
struct BackwardLayout {
  static_assert(D == 64, "head size 128 needs twice the shared memory that there is");

  // Consumers hold 64 keys each, and the gradients of these in registers; they share queries and tables. With a second
  // one the products of one run beside the exponentials of the other.
  static constexpr int kConsumers = 2;
  static constexpr int kRows = kConsumers * kTile;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kConsumerThreads = kConsumers * kWarpgroup;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  // Tiles of queries in flight: the next one arrives while one is computed. The frames leave no room for more.
  static constexpr int kStages = 2;
  // Blocks of both tables: each consumer's two, those of neighbours being shared, and one on its way.
  static constexpr int kSlots = kConsumers + 2;
  static constexpr int kTableMargin = kRows + kTile;

  static constexpr int kTileBytes = kTile * D * 2;
  static constexpr int kFrameBytes = kTile * kTile * 4;
  static constexpr int kPairBytes = kTile * kTile * 2;      // one 16-bit element per pair of a tile
  static constexpr int kSumBytes = kTile * D * 4;           // one tile or block of gradients, float32
  static constexpr int kStatisticsBytes = 2 * kTile * 4;    // of a tile of queries: shifts, then `out_dot_dout`

  // Of the block.
  static constexpr int kQueries = 0;
  static constexpr int kDouts = kQueries + kStages * kTileBytes;
  static constexpr int kPosRow = kDouts + kStages * kTileBytes;          // blocks of the table of rows: pos_query
  static constexpr int kPosColumn = kPosRow + kSlots * kTileBytes;       // and of that of columns: pos_key
  static constexpr int kConsumer = kPosColumn + kSlots * kTileBytes;

  // Of each consumer, from kConsumer on.
  static constexpr int kKeys = 0;
  static constexpr int kScores = kKeys + kTileBytes;                     // gradients of scores, in the place of the pair
  static constexpr int kRotated = kScores + kPairBytes;                  // two, by distance: see `GradientTiles`
  static constexpr int kColumns = kRotated + 2 * kPairBytes;             // two, by distance
  static constexpr int kFrame = kColumns + 2 * kPairBytes;
  static constexpr int kConsumerBytes = kFrame + kFrameBytes;

  static constexpr int kOnes = kConsumer + kConsumers * kConsumerBytes;  // 8 rows of 64 ones
  static constexpr int kStatistics = kOnes + 8 * kRowBytes;
  static constexpr int kPlace = kStatistics + kStages * kStatisticsBytes;   // a `Place`
  static constexpr int kFirstBlock = kPlace + 32;                          // an integer of each consumer's first thread
  static constexpr int kStageInfo = kFirstBlock + 16;
  static constexpr int kStageFull = kStageInfo + kStages * 16;
  static constexpr int kStageEmpty = kStageFull + kStages * 8;
  static constexpr int kSlotFull = kStageEmpty + kStages * 8;
  static constexpr int kSlotEmpty = kSlotFull + kSlots * 8;
  static constexpr int kSharedBytes = kSlotEmpty + kSlots * 8;

  static_assert(kSumBytes <= kFrameBytes, "a frame also stages gradients for a reduction");
  static_assert(kSharedBytes <= 227 << 10, "more shared memory than a block of sm_90 may have");
};

}  // namespace dk
