// Branches, and what makes warps and lanes wait for each other: barriers, mbarriers, setmaxnreg.
#pragma once
#include "memory_access.h"

namespace ptx {

inline void do_branch(Block&, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (lanes != warp.active) return warp.diverge(i.target, lanes);
  bool back = i.target < warp.pc;
  warp.pc = i.target;
  if (back && !warp.others.empty()) warp.choose();  // other lanes may be at the target, or between
}

inline void do_return(Block& block, Warp& warp, const Instruction&, uint32_t lanes) {
  warp.leave(lanes);
  block.events++;
}

inline void do_trap(Block&, Warp&, const Instruction&, uint32_t lanes) {
  fault(first_lane(lanes), "the kernel executed a trap");
}

inline void do_nothing(Block&, Warp&, const Instruction&, uint32_t) {}

// ---- bar.sync, bar.arrive. Settings: number (-1: in the first operand), threads (0: all, -1: in an operand), waits.

inline uint32_t uniform_value(const Warp& warp, int32_t offset, uint32_t lanes, const char* what) {
  const uint32_t* values = warp.reg(offset);
  uint32_t value = values[first_lane(lanes)];
  for (int lane = 0; lane < kLanes; lane++)
    if (lanes >> lane & 1 && values[lane] != value) fault(lane, "lanes of a warp disagree about %s", what);
  return value;
}

inline void finish_barrier(Block& block, NamedBarrier& barrier) {
  for (int id : barrier.waiting) {
    Warp& warp = block.warps[id];
    warp.clock.known.join(barrier.clocks);
    warp.clock.synchronise_warp();
    warp.barrier = -1;
    warp.wake();
  }
  barrier = NamedBarrier();
  block.events++;
}

inline void do_barrier(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  if (!block.whole_warp(warp, i, lanes, "bar.sync")) return;
  uint32_t number = s[0] >= 0 ? s[0] : uniform_value(warp, *o++, lanes, "the number of a barrier");
  uint32_t threads = s[1] >= 0 ? s[1] : uniform_value(warp, *o, lanes, "the threads of a barrier");
  if (number > 15) fault(first_lane(lanes), "there is no barrier %u, only 0 to 15", number);
  if (threads % kLanes)
    fault(first_lane(lanes), "a barrier for %u threads, which is no number of whole warps", threads);
  int expected = threads ? threads / kLanes : block.warps.size();
  NamedBarrier& barrier = block.barriers[number];
  if (barrier.arrived && barrier.expected != expected)
    fault(first_lane(lanes), "barrier %u: this warp expects %d warps, those before it %d", number, expected,
          barrier.expected);
  if (expected > int(block.warps.size()))
    fault(first_lane(lanes), "barrier %u waits for %u threads, more than the block has", number, threads);
  barrier.expected = expected;
  warp.clock.release(barrier.clocks, lanes);
  bool waits = s[2] != 0;
  if (waits) {
    barrier.waiting.push_back(warp.id);
    warp.waits_for = Ask::kBarrier, warp.barrier = number;
  }
  if (++barrier.arrived == expected) finish_barrier(block, barrier);
}

inline void do_warp_barrier(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  uint32_t wanted = uniform_value(warp, block.operands(i)[0], lanes, "the lanes of bar.warp.sync");
  if (!block.all_here(warp, i, wanted, lanes, "bar.warp.sync")) return;
  if (lanes == warp.live()) warp.clock.synchronise_warp();
}

// ---- mbarriers: an object of 8 bytes in shared memory

inline Mbarrier& mbarrier_at(Block& block, Warp& warp, uint32_t at, int lane) {
  for (Mbarrier& found : block.mbarriers)
    if (found.address == at) {
      // The past of the second word is that of the initialisation; the first is marked as no data.
      Record made = block.shadow.last_write(at + 4);
      if (!block.by_lane(warp, lane, "").after(made))
        fault(lane,
              "race: the mbarrier at byte %u is used, and nothing orders that behind its mbarrier.init by warp %d", at,
              agent_of(made));
      return found;
    }
  fault(lane, "there is no mbarrier at byte %u of shared memory: nobody executed mbarrier.init", at);
}

inline uint32_t shared_address(const Warp& warp, const Instruction& i, int32_t offset, int lane) {
  return warp.reg(offset)[lane] + uint32_t(i.offset);
}

inline void do_mbarrier_init(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t* o = block.operands(i);
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t at = shared_address(warp, i, o[0], lane), arrivals = warp.reg(o[1])[lane];
    check_aligned(at, 8, lane, "mbarrier");
    check_shared(block, at, 8, lane, "mbarrier.init");
    if (arrivals == 0 || arrivals >= 1u << 20)
      fault(lane, "an mbarrier for %u arrivals; 1 to 1048575 are possible", arrivals);
    for (const Mbarrier& old : block.mbarriers)
      if (old.address == at) fault(lane, "mbarrier.init of an mbarrier that is one already, at byte %u", at);
    if (block.next_agent > kLastAgent) fault(lane, "more mbarriers than the race check can tell apart");
    block.shadow.write(at, 8, block.by_lane(warp, lane, "mbarrier.init"));
    block.shadow.overwrite(at, 4, record_of(kBarrierObject, 0, 1));
    Mbarrier made{at, block.next_agent++, int32_t(arrivals), int32_t(arrivals)};
    block.mbarriers.push_back(made);
  }
  warp.clock.unsynchronised |= lanes;
}

// fence.mbarrier_init: the copy engine may use what this warp initialised. Other fences do the same and more.
inline void show_mbarriers(Block& block, Warp& warp) {
  for (Mbarrier& m : block.mbarriers)
    if (agent_of(block.shadow.last_write(m.address + 4)) == warp.id) m.visible = true;
}
inline void do_mbarrier_fence(Block& block, Warp& warp, const Instruction&, uint32_t) { show_mbarriers(block, warp); }
inline void do_proxy_fence(Block& block, Warp& warp, const Instruction&, uint32_t lanes) {
  show_mbarriers(block, warp);
  warp.clock.fence(lanes);
}

// A phase ends when nobody and nothing is owed any more.
inline void settle(Block& block, Mbarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  m.pending = m.arrivals;
  m.phase++;
  m.arrived.finished(m.agent, m.phase);
  m.done = m.arrived;
  block.events++;
}

inline void expect_bytes(Mbarrier& m, int64_t bytes, int lane) {
  m.bytes += bytes;
  if (m.bytes >= 1 << 20 || m.bytes <= -(1 << 20))
    fault(lane, "the mbarrier at byte %u counts %lld bytes; less than 1048576 are possible", m.address,
          (long long)m.bytes);
}

// mbarrier.arrive, .arrive.expect_tx and .expect_tx. Settings: whether it arrives, whether bytes are expected.
inline void do_mbarrier_arrive(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  Clocks released;
  warp.clock.release(released, lanes);
  const Mbarrier* told = nullptr;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    Mbarrier& m = mbarrier_at(block, warp, shared_address(warp, i, o[0], lane), lane);
    if (s[1]) expect_bytes(m, warp.reg(o[1])[lane], lane);
    if (!s[0]) continue;
    if (m.pending == 0)
      fault(lane, "the mbarrier at byte %u gets more arrivals in a phase than the %d it was made for", m.address,
            m.arrivals);
    m.pending--;
    if (told != &m) m.arrived.join(released), told = &m;
    settle(block, m);
  }
}

// mbarrier.try_wait.parity: here it waits until the phase is over, as it may, and is never false.
inline void do_mbarrier_wait(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t* o = block.operands(i);
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t at = shared_address(warp, i, o[1], lane);
    Mbarrier& m = mbarrier_at(block, warp, at, lane);
    if ((m.phase & 1) == (warp.reg(o[2])[lane] & 1)) return block.execute_later(warp, i);
  }
  const Mbarrier* told = nullptr;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    Mbarrier& m = mbarrier_at(block, warp, shared_address(warp, i, o[1], lane), lane);
    if (told != &m) warp.clock.known.join(m.done), told = &m;
  }
  warp.reg(o[0])[0] |= lanes;
}

// mbarrier.test_wait.parity: tells, and waits for nothing. A warp that is told no gives way to those that can go on.
inline void do_mbarrier_test(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t* o = block.operands(i);
  uint32_t over = 0;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    Mbarrier& m = mbarrier_at(block, warp, shared_address(warp, i, o[1], lane), lane);
    if ((m.phase & 1) == (warp.reg(o[2])[lane] & 1)) continue;
    over |= 1u << lane;
    warp.clock.known.join(m.done);
  }
  warp.reg(o[0])[0] = (warp.reg(o[0])[0] & ~lanes) | over;
  if (over != lanes) warp.waits_for = Ask::kTurn, warp.asked_at = block.events;
}

// ---- setmaxnreg. Settings: 1 to take registers, 0 to give some; how many a thread has then.

inline void do_setmaxnreg(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t* s = block.settings(i);
  if (!block.whole_warp(warp, i, lanes, "setmaxnreg")) return;
  int wanted = s[1], has = warp.registers_per_thread;
  if (wanted < 24 || wanted > 256 || wanted % 8)
    fault(first_lane(lanes), "setmaxnreg to %d registers; multiples of 8 from 24 to 256 are possible", wanted);
  if (s[0] ? wanted < has : wanted > has)
    fault(first_lane(lanes), "setmaxnreg.%s to %d registers, of %d", s[0] ? "inc" : "dec", wanted, has);
  int more = (wanted - has) * kLanes;
  if (more > block.registers_free) return block.execute_later(warp, i);
  block.registers_free -= more;
  warp.registers_per_thread = wanted;
  block.events++;
}

}  // namespace ptx
