// The producer: one warp that decides which tiles the block visits and copies them, with what belongs to them, ahead of
// the consumers. Lane 0 copies, once all lanes have waited: one that fell behind could miss a phase of the barrier, and
// wait for ever. That lane 0 alone waits would take registers that the producer does not have.
#pragma once
#include "schedule.h"

namespace dk {

template <int D>
class Producer {
  using L = Layout<D>;

 public:
  DK_DEVICE Producer(const ForwardParams& p, const Place& place, uint32_t shared, int lane)
      : p_(p), place_(place), shared_(shared), lane_(lane) {}

  DK_DEVICE void run() {
    const Walk<D> walk(p_, place_);
    bool carried = false;  // whether the tile before was near and visited
    StageInfo next = info_of(walk, 0);
    for (int tile = 0; tile < walk.tiles; tile++) {
      StageInfo info = next;
      if (tile + 1 < walk.tiles) next = info_of(walk, tile + 1);  // its mask arrives while this tile waits for a stage
      const bool near = info.zone == kNear;
      const bool visited = info.valid_low | info.valid_high;
      if (visited) {
        if (near && !carried) info.zone = kNearFirst;
        put(info);
        if (near) put_tables(info, carried);
      }
      carried = near && visited;
    }
    put(StageInfo{0, 0, 0, kEnd});
  }

 private:
  DK_DEVICE StageInfo info_of(const Walk<D>& walk, int tile) const {
    StageInfo info;
    info.zone = tile < walk.tiles ? walk.zone(tile) : (int)kEnd;
    info.first_key = walk.first_key(tile);
    const int start = tile < walk.prefix_tiles ? 0 : place_.prefix;
    const int stop = tile < walk.prefix_tiles ? place_.prefix : place_.nk;
    info.valid_low = valid_keys(info.first_key, start, stop);
    info.valid_high = valid_keys(info.first_key + 32, start, stop);
    return info;
  }

  // Return which of 32 keys are in [start, stop) and not masked.
  DK_DEVICE uint32_t valid_keys(int first, int start, int stop) const {
    const int key = first + lane_;
    bool valid = key >= start && key < stop;
    if (valid && p_.key_mask) valid = load_global(p_.key_mask + place_.batch * p_.key_mask_stride_b + key) != 0;
    return ballot(valid);
  }

  DK_DEVICE void put(const StageInfo& info) {
    const uint32_t full = shared_ + L::kStageFull + stage_.entry * 8;
    barrier_wait(shared_ + L::kStageEmpty + stage_.entry * 8, stage_.parity ^ 1);
    sync_warp();
    if (lane_ == 0) {
      store_shared_4(
          shared_ + L::kStageInfo + stage_.entry * 16, info.valid_low, info.valid_high, (uint32_t)info.first_key,
          (uint32_t)info.zone);
      if (info.zone == kEnd) {
        barrier_arrive(full);
      } else {
        barrier_arrive_expect(full, 2 * L::kTileBytes);
        const int token = place_.first_token + info.first_key, batch = p_.cu_seqlens ? 0 : place_.batch;
        const uint32_t offset = shared_ + stage_.entry * L::kTileBytes;
        DK_UNROLL
        for (int panel = 0; panel < D / kPanelColumns; panel++) {
          const uint32_t target = offset + panel * kTile * kRowBytes;
          copy_box(target + L::kKeys, p_.k, full, panel * kPanelColumns, token, place_.head, batch);
          copy_box(target + L::kValues, p_.v, full, panel * kPanelColumns, token, place_.head, batch);
        }
      }
    }
    stage_.advance();
  }

  // A visited run of near tiles reads blocks of 64 distances downwards: the first tile brings the high blocks of all
  // consumers, each tile the low block of consumer 0.
  DK_DEVICE void put_tables(const StageInfo& info, bool carried) {
    const int row = (int)p_.table_offset + place_.first_row + place_.prefix - info.first_key;
    if (!carried) {
      DK_UNROLL
      for (int consumer = L::kConsumers - 1; consumer >= 0; consumer--) put_blocks(row + consumer * kTile);
    }
    put_blocks(row - kTile);
  }

  DK_DEVICE void put_blocks(int row) {
    barrier_wait(shared_ + L::kSlotEmpty + slot_.entry * 8, slot_.parity ^ 1);
    sync_warp();
    if (lane_ == 0) {
      const uint32_t full = shared_ + L::kSlotFull + slot_.entry * 8;
      barrier_arrive_expect(full, 2 * L::kTileBytes);
      const uint32_t offset = shared_ + slot_.entry * L::kTileBytes;
      DK_UNROLL
      for (int panel = 0; panel < D / kPanelColumns; panel++) {
        const uint32_t target = offset + panel * kTile * kRowBytes;
        copy_box(target + L::kPosKey, p_.pos_key, full, panel * kPanelColumns, row, place_.head);
        copy_box(target + L::kPosQuery, p_.pos_query, full, panel * kPanelColumns, row, place_.head);
      }
    }
    slot_.advance();
  }

  const ForwardParams& p_;
  const Place& place_;
  const uint32_t shared_;
  const int lane_;
  RingPosition<L::kStages> stage_;
  RingPosition<L::kSlots> slot_;
};

}  // namespace dk
