// Sizes of tiles and where they lie in shared memory.
#pragma once
#include "operand.h"

namespace dk {

// Keys of a tile, rows of a table block, and queries of a consumer warpgroup: the matrix instruction has 64 rows, and
// three products of 64 x 64 in registers at once leave room for everything else.
constexpr int kTile = 64;

constexpr int kWarpgroup = 128;

// Numbers of the named barriers; 0 is that of the whole block. Each consumer has one of its own from the last one on.
constexpr int kConsumersBarrier = 1;
constexpr int kConsumerBarrier = 2;

template <int D>
struct Layout {
  // Consumers of one block share its keys and tables. Two at D = 64; the tiles of D = 128 are twice as large, and the
  // shared memory that one consumer's staging takes then leaves room for no second one.
  static constexpr int kConsumers = D == 64 ? 2 : 1;
  static constexpr int kRows = kConsumers * kTile;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  // Registers: 65,536 for (24 + 2 * 240) * 128 threads, or (24 + 480, capped at 255) * 128.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  // At D = 128 values take 64 registers and queries 32: fewer products in flight, fewer addresses kept.
  static constexpr bool kFewRegisters = D > 64;

  // Tiles of keys in flight. Two let the next one arrive while one is computed; what memory remains goes here, because
  // a tile of the far loop takes less time than a copy from device memory.
  static constexpr int kStages = D == 64 ? 4 : 2;
  // Blocks of both tables in use: each consumer's two, those of neighbours being shared, and one on its way.
  static constexpr int kSlots = kConsumers + 2;
  // Rows that an expanded table needs beyond the last distance in use, see `Walk` in schedule.h.
  static constexpr int kTableMargin = kRows + kTile;

  static constexpr int kTileBytes = kTile * D * 2;
  static constexpr int kFrameBytes = kTile * kTile * 4;  // of the larger elements that bias.h stages

  static constexpr int kKeys = 0;
  static constexpr int kValues = kKeys + kStages * kTileBytes;
  static constexpr int kPosKey = kValues + kStages * kTileBytes;
  static constexpr int kPosQuery = kPosKey + kSlots * kTileBytes;
  static constexpr int kRings = kPosQuery + kSlots * kTileBytes;      // two frames per consumer, see bias.h
  static constexpr int kFrames = kRings + kConsumers * 2 * kFrameBytes;
  static constexpr int kStageInfo = kFrames + kConsumers * kFrameBytes;  // one `StageInfo` per stage
  static constexpr int kStageFull = kStageInfo + kStages * 16;
  static constexpr int kStageEmpty = kStageFull + kStages * 8;
  static constexpr int kSlotFull = kStageEmpty + kStages * 8;
  static constexpr int kSlotEmpty = kSlotFull + kSlots * 8;
  static constexpr int kSharedBytes = kSlotEmpty + kSlots * 8;

  static_assert(D % kPanelColumns == 0, "tiles are whole panels");
  static_assert(kSharedBytes <= 227 << 10, "more shared memory than a block of sm_90 may have");
};

}  // namespace dk
