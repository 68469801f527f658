// Who knows of whose accesses. Every access leaves a record: an agent, a lane and the agent's clock. An agent is a
// warp, or something that works beside the warps: the products of a warpgroup, the copies that an mbarrier waits for. A
// warp keeps, for every agent, the clock up to which that agent's accesses lie in its past, twice: in the past of what
// it does itself (generic proxy), and in the past of what the copy engine and the tensor cores do for it (async proxy).
// Only a proxy fence, or the end of an asynchronous operation, carries knowledge from the first into the second.
#pragma once
#include <algorithm>
#include <cstdint>

#include "fault.h"

namespace ptx {

using Record = uint32_t;  // 0: nobody yet

constexpr int kClockBits = 19, kLaneBits = 6, kAgents = 128, kMostWarps = 32;
constexpr int kFirstProducts = kMostWarps;  // the agents of warpgroups' products, behind those of warps
constexpr uint32_t kClockMask = (1u << kClockBits) - 1;
constexpr int kSeveralLanes = 32;  // in the place of a lane
// Agents that are none: words that are a barrier object, and words that cp.async is about to write.
constexpr int kBarrierObject = 127, kCopyInFlight = 126, kLastAgent = 125;

inline Record record_of(int agent, int lane, uint32_t clock) {
  if (clock > kClockMask)
    fault(-1, "a block synchronises more than %u times, which the race check cannot count", kClockMask);
  return uint32_t(agent) << (kClockBits + kLaneBits) | uint32_t(lane) << kClockBits | clock;
}
inline int agent_of(Record record) { return record >> (kClockBits + kLaneBits); }
inline int lane_of(Record record) { return record >> kClockBits & ((1 << kLaneBits) - 1); }

// What somebody knows: of every agent all that it did up to a clock; of a warp, beyond that, what some lanes did up to
// a later clock, as happens when one lane arrives at an mbarrier while the others have gone on without it.
struct Known {
  uint32_t all[kAgents] = {};
  uint32_t some[kMostWarps] = {}, lanes[kMostWarps] = {};
  // Of a warp, up to which product its own wait has said that its quarter is done; the whole is when all four are.
  uint32_t quarters[kMostWarps] = {};

  bool includes(Record record) const {
    uint32_t clock = record & kClockMask;
    int agent = agent_of(record);
    return clock <= all[agent] || (agent < kMostWarps && clock <= some[agent] && lanes[agent] >> lane_of(record) & 1 &&
                                   lane_of(record) < kSeveralLanes);
  }
  void add(int warp, uint32_t clock, uint32_t which) {
    if (clock > some[warp]) some[warp] = clock, lanes[warp] = which;
    else if (clock == some[warp]) lanes[warp] |= which;
  }
  void finish_quarter(int warp, uint32_t clock) {
    quarters[warp] = std::max(quarters[warp], clock);
    const uint32_t* four = quarters + warp / 4 * 4;
    uint32_t& whole = all[kFirstProducts + warp / 4];
    whole = std::max(whole, std::min(std::min(four[0], four[1]), std::min(four[2], four[3])));
  }
  void join(const Known& other) {
    for (int i = 0; i < kAgents; i++) all[i] = std::max(all[i], other.all[i]);
    for (int i = 0; i < kMostWarps; i++) finish_quarter(i, other.quarters[i]);
    for (int i = 0; i < kMostWarps; i++) add(i, other.some[i], other.lanes[i]);
  }
  void meet(const Known& other) {
    for (int i = 0; i < kAgents; i++) all[i] = std::min(all[i], other.all[i]);
    for (int i = 0; i < kMostWarps; i++) quarters[i] = std::min(quarters[i], other.quarters[i]);
    for (int i = 0; i < kMostWarps; i++) some[i] = std::min(some[i], other.some[i]), lanes[i] &= other.lanes[i];
  }
};

struct Clocks {
  Known generic, async;

  void join(const Clocks& other) { generic.join(other.generic), async.join(other.async); }
  void meet(const Clocks& other) { generic.meet(other.generic), async.meet(other.async); }
  // Learn that an agent's asynchronous work is done up to a clock; its end is a proxy fence.
  void finished_quarter(int warp, uint32_t clock) {
    generic.finish_quarter(warp, clock), async.finish_quarter(warp, clock);
  }
  void finished(int agent, uint32_t clock) {
    generic.all[agent] = std::max(generic.all[agent], clock);
    async.all[agent] = std::max(async.all[agent], clock);
  }
};

// The clock of a warp. Its lanes are ordered among each other by what synchronises the warp, not by running in
// lockstep, which no GPU promises: `known.generic.all[self]` is the last clock at which the warp was synchronised.
struct WarpClock {
  int self = 0;
  uint32_t now = 1;
  uint32_t unsynchronised = 0;  // lanes that accessed memory since the warp was synchronised
  Clocks known;

  void synchronise_warp() {
    known.generic.all[self] = now++;
    unsynchronised = 0;
  }
  // What others learn when these lanes arrive at a barrier.
  void release(Clocks& into, uint32_t arriving) {
    into.join(known);
    tell(into.generic, arriving);
    now++;
  }
  // fence.proxy.async
  void fence(uint32_t executing) {
    known.async.join(known.generic);
    tell(known.async, executing);
    now++;
  }

 private:
  // These lanes speak for themselves, and for the warp if no other lane has done anything since it was synchronised.
  void tell(Known& into, uint32_t speaking) const {
    if (unsynchronised & ~speaking) into.add(self, now, speaking);
    else into.all[self] = std::max(into.all[self], now);
  }
};

}  // namespace ptx
