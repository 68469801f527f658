// The copy engine: tiles of a tensor map to shared memory, reported to an mbarrier, and sums from shared memory to
// global memory. What it does happens at a random later moment, at the latest when nothing else can.
#pragma once
#include "control.h"

namespace ptx {

// The 128 bytes of a tensor map. A driver's own are secret; tools/ptx/tensor_map.py writes these.
struct TensorMap {
  static constexpr uint32_t kMagic = 0x50414d54;
  uint32_t magic, rank, element_bytes, swizzle;  // swizzle: bytes of a swizzled row, 0: none
  uint64_t address;
  uint64_t strides[4];  // bytes, of the dimensions but the innermost
  uint32_t sizes[5], box[5];
};

struct BulkCopy {
  bool sum;  // else a tile
  uint32_t shared_at;
  int64_t bytes;
  int warp, lane;
  uint32_t clock;  // of the agent that does it
  // Of a tile.
  TensorMap map;
  int32_t from[5];
  uint32_t mbarrier;
  // Of a sum.
  uint64_t global_at;
};

inline const TensorMap& tensor_map_at(const Block& block, uint64_t at, int lane) {
  const void* memory = reinterpret_cast<const void*>(at);
  if ((at & kWindowMask) == kParamWindow) {
    uint64_t offset = at & ~kWindowMask;
    if (offset + 128 > block.parameters.size()) fault(lane, "a tensor map beyond the parameters");
    memory = block.parameters.data() + offset;
  } else if (at & kWindowMask) {
    fault(lane, "a tensor map in shared memory");
  }
  check_aligned(at & ~kWindowMask, 64, lane, "tensor map");
  const TensorMap& map = *static_cast<const TensorMap*>(memory);
  if (map.magic != TensorMap::kMagic) fault(lane, "the address of a tensor map, where there is none");
  return map;
}

inline void count_bulk(Block& block, const Instruction& i, int64_t bytes) {
  block.count(i).sectors += bytes / 32;
  block.count(i).bytes += bytes;
}

// Settings: dimensions. Operands: target, map, coordinates from the innermost on, mbarrier. The offsets of target and
// map are settings 1 and 2, that of the mbarrier setting 3.
inline void do_tile_copy(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    BulkCopy copy{};
    copy.map = tensor_map_at(block, warp.wide(o[1])[lane] + s[2], lane);
    if (int(copy.map.rank) != s[0]) fault(lane, "a copy of %d dimensions from a tensor map of %u", s[0], copy.map.rank);
    copy.shared_at = warp.reg(o[0])[lane] + s[1], copy.warp = warp.id, copy.lane = lane;
    copy.bytes = copy.map.element_bytes;
    for (int d = 0; d < s[0]; d++) copy.from[d] = int32_t(warp.reg(o[2 + d])[lane]), copy.bytes *= copy.map.box[d];
    check_aligned(copy.shared_at, 128, lane, "target of a tile copy");
    check_shared(block, copy.shared_at, copy.bytes, lane, "tile copy");
    copy.mbarrier = warp.reg(o[2 + s[0]])[lane] + s[3];
    Mbarrier& m = mbarrier_at(block, warp, copy.mbarrier, lane);
    if (!m.visible)
      fault(lane,
            "the copy engine is given the mbarrier at byte %u, and no fence.mbarrier_init or fence.proxy.async follows "
            "its mbarrier.init",
            m.address);
    Access access = block.for_lane(warp, lane, m.agent, m.phase + 1, "tile copy");
    block.shadow.write(copy.shared_at, copy.bytes, access);
    copy.clock = m.phase + 1;
    count_bulk(block, i, copy.bytes);
    block.bulk.push_back(new BulkCopy(copy));
  }
}

// Settings: offset of the source. Operands: target in global memory, source, bytes.
inline void do_bulk_sum(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  int agent = block.bulk_agents + warp.id;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    BulkCopy copy{};
    copy.sum = true, copy.warp = warp.id, copy.lane = lane;
    copy.global_at = warp.wide(o[0])[lane] + i.offset, copy.shared_at = warp.reg(o[1])[lane] + s[0];
    copy.bytes = warp.reg(o[2])[lane], copy.clock = warp.bulk_clock + 1;
    check_aligned(copy.global_at, 16, lane, "target of a reduction");
    check_aligned(copy.shared_at, 16, lane, "source of a reduction");
    check_aligned(copy.bytes, 16, lane, "size of a reduction");
    check_shared(block, copy.shared_at, copy.bytes, lane, "reduction");
    Access access = block.for_lane(warp, lane, agent, copy.clock, "reduction");
    block.shadow.read(copy.shared_at, copy.bytes, access);
    block.global.access(copy.global_at, copy.bytes, access, true, true);
    count_bulk(block, i, copy.bytes);
    warp.bulk_lanes |= 1u << lane;
    block.bulk.push_back(new BulkCopy(copy));
  }
}

// One row of the box: what lies in the tensor is copied, the rest becomes zero.
inline void land_row(Block& block, const BulkCopy& copy, const Access& reader, int64_t source, bool inside,
                     uint32_t target) {
  const TensorMap& map = copy.map;
  static thread_local uint8_t row[256 * 8];
  uint32_t bytes = map.box[0] * map.element_bytes, bits = map.swizzle / 16 - (map.swizzle != 0);
  int64_t begin = std::max<int64_t>(0, -copy.from[0]),
          end = std::min<int64_t>(map.box[0], int64_t(map.sizes[0]) - copy.from[0]);
  memset(row, 0, bytes);
  if (inside && begin < end) {
    uint64_t from = source + (copy.from[0] + begin) * map.element_bytes, size = (end - begin) * map.element_bytes;
    block.global.access(from, size, reader, false);
    memcpy(row + begin * map.element_bytes, reinterpret_cast<const void*>(from), size);
  }
  // Pieces of 16 bytes change places within a swizzled row.
  for (uint32_t x = 0; x < bytes; x += 16) {
    uint32_t at = target + x;
    memcpy(&block.shared[at ^ (at >> 7 & bits) << 4], row + x, 16);
  }
}

inline void land_tile(Block& block, const BulkCopy& copy) {
  const TensorMap& map = copy.map;
  uint32_t at[5] = {}, target = copy.shared_at, d;
  Access reader = block.by_lane(block.warps[copy.warp], copy.lane, "tile copy");
  do {
    bool inside = true;
    int64_t source = map.address;
    for (d = 1; d < map.rank; d++) {
      int64_t index = int64_t(copy.from[d]) + at[d];
      inside &= index >= 0 && index < map.sizes[d];
      source += index * int64_t(map.strides[d - 1]);
    }
    land_row(block, copy, reader, source, inside, target);
    target += map.box[0] * map.element_bytes;
    for (d = 1; d < map.rank && ++at[d] == map.box[d]; d++) at[d] = 0;
  } while (d < map.rank);
}

inline void land_bulk(Block& block, size_t index) {
  BulkCopy* copy = block.bulk[index];
  block.bulk.erase(block.bulk.begin() + index);
  if (copy->sum) {
    const float* source = reinterpret_cast<const float*>(&block.shared[copy->shared_at]);
    float* target = reinterpret_cast<float*>(copy->global_at);
    for (int64_t x = 0; x < copy->bytes / 4; x++) target[x] += source[x];
  } else {
    land_tile(block, *copy);
    for (Mbarrier& m : block.mbarriers)
      if (m.address == copy->mbarrier) {
        m.bytes -= copy->bytes;
        settle(block, m);
      }
  }
  block.events++;
  delete copy;
}

inline void do_bulk_commit(Block&, Warp& warp, const Instruction&, uint32_t) {
  warp.bulk_groups.push_back(++warp.bulk_clock);
}

// cp.async.bulk.wait_group, also .read: here a reduction has read when it is done.
inline void do_bulk_wait(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!(lanes & warp.bulk_lanes) || int64_t(warp.bulk_groups.size()) <= i.offset) return;
  size_t finished = warp.bulk_groups.size() - i.offset;
  uint32_t last = warp.bulk_groups[finished - 1];
  for (size_t index = 0; index < block.bulk.size();) {
    const BulkCopy& copy = *block.bulk[index];
    if (copy.sum && copy.warp == warp.id && copy.clock <= last) land_bulk(block, index);
    else index++;
  }
  warp.bulk_groups.erase(warp.bulk_groups.begin(), warp.bulk_groups.begin() + finished);
  warp.clock.known.finished(block.bulk_agents + warp.id, last);
}

// Shared memory goes when the block ends; what still reads or writes it then is an error.
inline void check_nothing_in_flight(const Block& block) {
  for (const BulkCopy* copy : block.bulk)
    fault(-1, "the block ends while %s of warp %d is in flight", copy->sum ? "a reduction" : "a tile copy", copy->warp);
  for (const Warp& warp : block.warps)
    if (!warp.bulk_groups.empty()) fault(-1, "warp %d ends without waiting for its reductions", warp.id);
}

inline Block::~Block() {
  for (BulkCopy* copy : bulk) delete copy;
}

}  // namespace ptx
