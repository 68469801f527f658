// cp.async: copies of 4 to 16 bytes from global to shared memory that a lane starts and later waits for. They land when
// the lane waits; until then their target may not be touched by anyone.
#pragma once
#include "control.h"

namespace ptx {

// Operands: target, source, and the bytes to read when the third setting says so; what is not read becomes zero.
// Settings: bytes, offset of the source, whether there is a third operand.
inline void do_copy(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  uint32_t bytes = s[0], targets[kLanes], reading = 0;
  uint64_t sources[kLanes];
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    Warp::Copy copy{shared_address(warp, i, o[0], lane), bytes, bytes, warp.wide(o[1])[lane] + s[1], lane};
    if (s[2]) copy.real = warp.reg(o[2])[lane];
    if (copy.real > bytes) fault(lane, "cp.async reads %u bytes and writes %u", copy.real, bytes);
    check_aligned(copy.target, bytes, lane, "cp.async");
    check_shared(block, copy.target, bytes, lane, "cp.async");
    Access access = block.by_lane(warp, lane, "cp.async");
    block.shadow.write(copy.target, bytes, access);
    block.shadow.overwrite(copy.target, bytes, record_of(kCopyInFlight, 0, 1));
    if (copy.real) {
      check_aligned(copy.source, bytes, lane, "cp.async");
      block.global.access(copy.source, copy.real, access, false);
      reading |= 1u << lane;
    }
    targets[lane] = copy.target, sources[lane] = copy.source;
    warp.open_copies.push_back(copy);
  }
  warp.clock.unsynchronised |= lanes;
  count_wavefronts(targets, lanes, bytes, block.count(i));
  count_sectors(sources, reading, bytes, block.count(i));
}

inline void do_copy_commit(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!block.whole_warp(warp, i, lanes, "cp.async.commit_group")) return;
  warp.copy_groups.push_back(std::move(warp.open_copies));
  warp.open_copies.clear();
}

inline void land(Block& block, Warp& warp, const std::vector<Warp::Copy>& copies) {
  for (const Warp::Copy& copy : copies) {
    uint8_t* target = &block.shared[copy.target];
    memcpy(target, reinterpret_cast<const void*>(copy.source), copy.real);
    memset(target + copy.real, 0, copy.bytes - copy.real);
    block.shadow.overwrite(copy.target, copy.bytes, block.by_lane(warp, copy.lane, "cp.async").record);
    warp.clock.unsynchronised |= 1u << copy.lane;
  }
}

// cp.async.wait_group, and wait_all (setting 1), which does not ask whether copies were committed.
inline void do_copy_wait(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!block.whole_warp(warp, i, lanes, "cp.async.wait_group")) return;
  size_t left = i.offset;
  while (warp.copy_groups.size() > left) {
    land(block, warp, warp.copy_groups.front());
    warp.copy_groups.erase(warp.copy_groups.begin());
  }
  if (!block.settings(i)[0]) return;
  land(block, warp, warp.open_copies);
  warp.open_copies.clear();
}

}  // namespace ptx
