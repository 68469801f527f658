// The producer of the backward: one warp that brings tiles of queries, what the consumers need of each query, and blocks
// of both tables. As in the forward, lane 0 copies once all have waited.
#pragma once
#include "backward_schedule.h"

namespace dk {

template <int D>
class QueryProducer {
  using L = BackwardLayout<D>;

 public:
  DK_DEVICE QueryProducer(const BackwardParams& p, uint32_t shared, int lane) : p_(p), shared_(shared), lane_(lane) {}

  // Bring everything that one block of keys meets.
  DK_DEVICE void run(int number) {
    const KeyBlock block(load_place<D>(shared_), number, L::kRows);
    const QueryWalk<D> walk(p_, load_place<D>(shared_), block);
    bool carried = false;  // whether the tile before was near and visited
    const int tiles = any_key(block) ? walk.tiles : 0, of_block = number << 4 | has_all_keys(block) << 3;
    Tile next = tile_of(0, tiles);
    for (int tile = 0; tile < tiles; tile++) {
      const Tile now = next;
      next = tile_of(tile + 1, tiles);  // arrives while this tile waits for a stage
      int zone = walk.zone(tile);
      const bool near = zone == kNear, visited = now.valid[0] | now.valid[1];
      if (visited) {
        if (near && !carried) zone = kNearFirst;
        put(now, tile * kTile, zone | of_block);
        if (near) put_tables(walk.x0 - tile * kTile, carried);
      }
      carried = near && visited;
    }
    put(Tile{}, 0, kEnd | of_block);
  }

 private:
  // Of queries `lane` and `lane + 32` of a tile the log-sum-exp; of all queries whether they have one.
  struct Tile {
    float lse[2];
    uint32_t valid[2];
  };

  DK_DEVICE bool any_key(const KeyBlock& block) const {
    const Place place = load_place<D>(shared_);
    bool valid = false;
    for (int i = lane_; i < L::kRows; i += 32) {
      const int key = block.first_key + i;
      if (key < block.start || key >= block.stop) continue;
      valid |= !p_.key_mask || load_global(p_.key_mask + place.batch * p_.key_mask_stride_b + key) != 0;
    }
    return ballot(valid) != 0;
  }

  DK_DEVICE bool has_all_keys(const KeyBlock& block) const {
    const Place place = load_place<D>(shared_);
    const int first = at_least(block.first_key, block.start), last = at_most(block.first_key + L::kRows, block.stop);
    if (!p_.key_mask) return last - first == place.nk;
    const uint8_t* mask = p_.key_mask + place.batch * p_.key_mask_stride_b;
    for (int i = 0; i < place.nk; i += 32) {
      const int key = i + lane_;
      if (ballot(key < place.nk && (key < first || key >= last) && load_global(mask + key) != 0) != 0) return false;
    }
    return true;
  }

  // Where a query's number lies among those of all queries.
  DK_DEVICE int64_t at(const Place& place, int row) const {
    const int batch = p_.cu_seqlens ? 0 : place.batch;
    return (batch * p_.heads + place.head) * p_.nq + place.first_token + row;
  }

  DK_DEVICE Tile tile_of(int number, int tiles) const {
    const Place place = load_place<D>(shared_);
    Tile tile;
    DK_UNROLL
    for (int i = 0; i < 2; i++) {
      const int row = number * kTile + 32 * i + lane_;
      tile.lse[i] = -minus_infinity();
      if (number < tiles && row < place.nq) tile.lse[i] = load_global(p_.lse2 + at(place, row));
      tile.valid[i] = ballot(tile.lse[i] != -minus_infinity());
    }
    return tile;
  }

  DK_DEVICE void put(const Tile& tile, int first_query, int word) {
    const int zone = Visit{word}.zone();
    const uint32_t full = shared_ + L::kStageFull + stage_.entry() * 8;
    barrier_wait(shared_ + L::kStageEmpty + stage_.entry() * 8, stage_.parity() ^ 1);
    sync_warp();
    if (lane_ == 0) {
      store_shared_4(
          shared_ + L::kStageInfo + stage_.entry() * 16, tile.valid[0], tile.valid[1], (uint32_t)first_query,
          (uint32_t)word);
      if (zone == kEnd) barrier_arrive(full);
      else put_queries(full, first_query, zone);
    }
    if (zone != kEnd) {
      put_statistics(tile, first_query, zone);
      sync_warp();
    }
    if (lane_ == 0) barrier_arrive(full);  // for all lanes
    stage_.count++;
  }

  DK_DEVICE void put_queries(uint32_t full, int first_query, int zone) const {
    barrier_arrive_expect(full, 2 * L::kTileBytes);
    const Place place = load_place<D>(shared_);
    const int token = place.first_token + first_query, batch = p_.cu_seqlens ? 0 : place.batch;
    const int samples = p_.cu_seqlens ? 1 : (int)p_.batch;
    const uint32_t offset = shared_ + stage_.entry() * L::kTileBytes;
    const bool far = zone == kLeft || zone == kRight;
    DK_UNROLL
    for (int panel = 0; panel < D / kPanelColumns; panel++) {
      const uint32_t target = offset + panel * kTile * kRowBytes;
      const int column = panel * kPanelColumns, side = zone == kLeft ? batch : samples + batch;
      if (far) copy_box(target + L::kQueries, p_.q_far, full, column, token, place.head, side);
      else copy_box(target + L::kQueries, p_.q, full, column, token, place.head, batch);
      copy_box(target + L::kDouts, p_.dout, full, column, token, place.head, batch);
    }
  }

  // A score plus its query's shift is the logarithm of the probability; what a far zone adds to scores is in the shift.
  DK_DEVICE void put_statistics(const Tile& tile, int first_query, int zone) const {
    const Place place = load_place<D>(shared_);
    const int64_t side = zone == kLeft ? 0 : (p_.cu_seqlens ? 1 : p_.batch) * p_.heads * p_.nq;
    const bool far = zone == kLeft || zone == kRight;
    DK_UNROLL
    for (int i = 0; i < 2; i++) {
      float shift = minus_infinity(), out_dot_dout = 0.0f;
      if (tile.lse[i] != -minus_infinity()) {
        const int64_t row = at(place, first_query + 32 * i + lane_);
        out_dot_dout = load_global(p_.out_dot_dout + row);
        shift = (far ? load_global(p_.far_constants + side + row) : 0.0f) - tile.lse[i];
      }
      const uint32_t target = shared_ + L::kStatistics + stage_.entry() * L::kStatisticsBytes + (32 * i + lane_) * 4;
      store_shared(target, shift);
      store_shared(target + kTile * 4, out_dot_dout);
    }
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
    barrier_wait(shared_ + L::kSlotEmpty + slot_.entry() * 8, slot_.parity() ^ 1);
    sync_warp();
    if (lane_ == 0) {
      const uint32_t full = shared_ + L::kSlotFull + slot_.entry() * 8;
      const int head = load_place<D>(shared_).head;
      barrier_arrive_expect(full, 2 * L::kTileBytes);
      const uint32_t offset = shared_ + slot_.entry() * L::kTileBytes;
      DK_UNROLL
      for (int panel = 0; panel < D / kPanelColumns; panel++) {
        const uint32_t target = offset + panel * kTile * kRowBytes;
        copy_box(target + L::kPosRow, p_.pos_query, full, panel * kPanelColumns, row, head);
        copy_box(target + L::kPosColumn, p_.pos_key, full, panel * kPanelColumns, row, head);
      }
    }
    slot_.count++;
  }

  const BackwardParams& p_;
  const uint32_t shared_;
  const int lane_;
  RingCounter<L::kStages> stage_;
  RingCounter<L::kSlots> slot_;
};

}  // namespace dk
