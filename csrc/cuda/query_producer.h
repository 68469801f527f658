// The producer of the backward: one warp that brings tiles of queries, what the consumers need of each query, and blocks
// of both tables.
#pragma once
#include "backward_schedule.h"

namespace dk {

template <int D>
class QueryProducer {
  using L = BackwardLayout<D>;

 public:
  DK_DEVICE QueryProducer(const BackwardParams& p, const Place& place, uint32_t shared, int lane)
      : p_(p), place_(place), shared_(shared), lane_(lane) {}

  // Bring everything that one block of keys meets.
  DK_DEVICE void run(const KeyBlock& block) {
    const QueryWalk<D> walk(p_, place_, block);
    bool carried = false;  // whether the tile before was near and visited
    const int tiles = any_key(block) ? walk.tiles : 0;
    Tile next = tile_of(walk, 0, tiles);
    for (int tile = 0; tile < tiles; tile++) {
      Tile now = next;
      next = tile_of(walk, tile + 1, tiles);  // arrives while this tile waits for a stage
      const bool near = now.info.zone == kNear;
      const bool visited = now.info.valid_low | now.info.valid_high;
      if (visited) {
        if (near && !carried) now.info.zone = kNearFirst;
        put(now);
        if (near) put_tables(walk.x0 - now.info.first_key, carried);
      }
      carried = near && visited;
    }
    Tile end{};
    end.info.zone = kEnd;
    put(end);
  }

 private:
  // What goes with a tile: queries `lane` and `lane + 32` of it.
  struct Tile {
    StageInfo info;  // first_key: the first query
    float shift[2], delta[2];
  };

  DK_DEVICE bool any_key(const KeyBlock& block) const {
    bool valid = false;
    for (int i = lane_; i < L::kRows; i += 32) {
      const int key = block.first_key + i;
      if (key < block.start || key >= block.stop) continue;
      valid |= !p_.key_mask || load_global(p_.key_mask + place_.batch * p_.key_mask_stride_b + key) != 0;
    }
    return ballot(valid) != 0;
  }

  // A score less its query's shift is the logarithm of the probability; what a far zone adds to scores is in the shift.
  DK_DEVICE Tile tile_of(const QueryWalk<D>& walk, int number, int tiles) const {
    Tile tile{};
    if (number >= tiles) return tile;
    tile.info.zone = walk.zone(number);
    tile.info.first_key = number * kTile;
    const bool far = tile.info.zone == kLeft || tile.info.zone == kRight;
    const int64_t samples = p_.cu_seqlens ? 1 : p_.batch, batch = p_.cu_seqlens ? 0 : place_.batch;
    uint32_t valid[2];
    DK_UNROLL
    for (int i = 0; i < 2; i++) {
      const int row = tile.info.first_key + 32 * i + lane_;
      const int64_t at = (batch * p_.heads + place_.head) * p_.nq + place_.first_token + row;
      float lse = -minus_infinity();
      if (row < place_.nq) {
        lse = load_global(p_.lse2 + at);
        tile.delta[i] = load_global(p_.delta + at);
      }
      const bool is_there = lse != -minus_infinity();
      tile.shift[i] = minus_infinity();
      if (is_there) {
        const int64_t side = tile.info.zone == kLeft ? 0 : samples * p_.heads * p_.nq;
        tile.shift[i] = (far ? load_global(p_.far_constants + side + at) : 0.0f) - lse;
      }
      valid[i] = ballot(is_there);
    }
    tile.info.valid_low = valid[0], tile.info.valid_high = valid[1];
    return tile;
  }

  DK_DEVICE void put(const Tile& tile) {
    const uint32_t full = shared_ + L::kStageFull + stage_.entry * 8;
    const int zone = tile.info.zone;
    barrier_wait(shared_ + L::kStageEmpty + stage_.entry * 8, stage_.parity ^ 1);
    DK_UNROLL
    for (int i = 0; i < 2; i++) {
      const uint32_t statistics = shared_ + L::kStatistics + stage_.entry * L::kStatisticsBytes + (32 * i + lane_) * 4;
      store_shared(statistics, tile.shift[i]);
      store_shared(statistics + kTile * 4, tile.delta[i]);
    }
    sync_warp();  // lane 0 arrives for all
    if (lane_ == 0) {
      store_shared_4(
          shared_ + L::kStageInfo + stage_.entry * 16, tile.info.valid_low, tile.info.valid_high,
          (uint32_t)tile.info.first_key, (uint32_t)zone);
      if (zone == kEnd) {
        barrier_arrive(full);
      } else {
        barrier_arrive_expect(full, 2 * L::kTileBytes);
        const int token = place_.first_token + tile.info.first_key, batch = p_.cu_seqlens ? 0 : place_.batch;
        const int samples = p_.cu_seqlens ? 1 : (int)p_.batch;
        const uint32_t offset = shared_ + stage_.entry * L::kTileBytes;
        const bool far = zone == kLeft || zone == kRight;
        DK_UNROLL
        for (int panel = 0; panel < D / kPanelColumns; panel++) {
          const uint32_t target = offset + panel * kTile * kRowBytes;
          const int column = panel * kPanelColumns, side = zone == kLeft ? batch : samples + batch;
          if (far) copy_box(target + L::kQueries, p_.q_far, full, column, token, place_.head, side);
          else copy_box(target + L::kQueries, p_.q, full, column, token, place_.head, batch);
          copy_box(target + L::kDouts, p_.dout, full, column, token, place_.head, batch);
        }
      }
    }
    sync_warp();
    stage_.advance();
  }

  // As in the forward: a run of near tiles reads blocks of 64 distances downwards.
  DK_DEVICE void put_tables(int x0, bool carried) {
    const int row = (int)p_.table_offset + x0;
    if (!carried) {
      DK_UNROLL
      for (int consumer = L::kConsumers - 1; consumer >= 0; consumer--) put_blocks(row + consumer * kTile);
    }
    put_blocks(row - kTile);
  }

  DK_DEVICE void put_blocks(int row) {
    barrier_wait(shared_ + L::kSlotEmpty + slot_.entry * 8, slot_.parity ^ 1);
    if (lane_ == 0) {
      const uint32_t full = shared_ + L::kSlotFull + slot_.entry * 8;
      barrier_arrive_expect(full, 2 * L::kTileBytes);
      const uint32_t offset = shared_ + slot_.entry * L::kTileBytes;
      DK_UNROLL
      for (int panel = 0; panel < D / kPanelColumns; panel++) {
        const uint32_t target = offset + panel * kTile * kRowBytes;
        copy_box(target + L::kPosRow, p_.pos_query, full, panel * kPanelColumns, row, place_.head);
        copy_box(target + L::kPosColumn, p_.pos_key, full, panel * kPanelColumns, row, place_.head);
      }
    }
    sync_warp();
    slot_.advance();
  }

  const BackwardParams& p_;
  const Place& place_;
  const uint32_t shared_;
  const int lane_;
  RingPosition<L::kStages> stage_;
  RingPosition<L::kSlots> slot_;
};

}  // namespace dk
