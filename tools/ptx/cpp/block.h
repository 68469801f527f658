// One thread block: its shared memory, its warps, its barriers, and what is in flight beside the warps.
#pragma once
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "global_memory.h"
#include "lanes.h"
#include "shadow.h"
#include "wavefronts.h"

namespace ptx {

// Addresses of the generic space that are not global memory.
constexpr uint64_t kSharedWindow = 1ull << 60, kParamWindow = 2ull << 60, kLocalWindow = 3ull << 60,
                   kWindowMask = 15ull << 60;

struct NamedBarrier {
  int expected = 0, arrived = 0;  // warps
  std::vector<int> waiting;
  Clocks clocks;
};

struct Mbarrier {
  uint32_t address;
  int agent;
  int32_t arrivals;   // of a phase
  int32_t pending;    // arrivals that the phase still lacks
  int64_t bytes = 0;  // that copies still owe it
  uint32_t phase = 0;
  Clocks arrived, done;  // what those who arrived know, and what those who wait learn
  bool visible = false;  // to the copy engine
};

// A copy or reduction that the copy engine has not done yet.
struct BulkCopy;

// One product that the four warps of a warpgroup ask for together.
struct Product {
  const Instruction* instruction;
  uint64_t first, second;  // descriptors
  uint32_t accumulate;
  int warps = 0;  // that have asked
  Clocks known;   // to all of them
};

// An instruction touched a register of a product that `by` started and nobody waited for.
struct BusyRegister {
  int32_t by;
  bool writes;
};

struct Warpgroup {
  int agent;
  int64_t started = 0;         // products computed
  std::vector<Product> asked;  // not computed, oldest first
};

struct Block {
  Block(const Program& program, GlobalMemory& global, const std::vector<uint8_t>& parameters, Count* counts,
        uint64_t seed)
      : program(program),
        global(global),
        parameters(parameters),
        counts(counts),
        random((seed + 1) * 0x9e3779b97f4a7c15ull) {}
  ~Block();

  const Program& program;
  GlobalMemory& global;
  const std::vector<uint8_t>& parameters;
  Count* counts;
  uint64_t random;

  std::vector<uint8_t> shared;
  Shadow shadow;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  std::vector<Mbarrier> mbarriers;
  std::vector<Warpgroup> warpgroups;
  std::vector<BulkCopy*> bulk;
  int bulk_agents = 0, next_agent = 0;
  int64_t events = 0;  // things that a waiting warp may have waited for
  int polls = 0;       // turns of warps that poll, since something else happened
  int registers_free = 0;
  uint32_t late = 0;  // warps that run only while no other can

  const int32_t* operands(const Instruction& i) const { return program.operands + i.operands; }
  const int32_t* settings(const Instruction& i) const { return program.settings + i.settings; }
  Count& count(const Instruction& i) { return counts[&i - program.instructions]; }

  // Execute the instruction again when something has happened.
  void execute_later(Warp& warp, const Instruction& i, bool meets = false) {
    count(i).executed--;
    warp.suspend(events, meets);
  }

  // xorshift64*, Vigna 2016
  uint32_t draw(uint32_t below) {
    random ^= random >> 12, random ^= random << 25, random ^= random >> 27;
    return uint64_t(uint32_t(random * 2685821657736338717ull >> 32)) * below >> 32;
  }

  // Whether the lanes that an instruction is for are those that execute it; false: not yet, it is executed later.
  bool all_here(Warp& warp, const Instruction& i, uint32_t wanted, uint32_t lanes, const char* what) {
    wanted &= warp.live();
    if (wanted == lanes) return true;
    if (!warp.others_may_come(events))
      fault(first_lane(wanted & ~lanes), "divergence at a barrier: %s is for lanes 0x%08x and executed by 0x%08x", what,
            wanted, lanes);
    execute_later(warp, i, true);
    return false;
  }
  bool whole_warp(Warp& warp, const Instruction& i, uint32_t lanes, const char* what) {
    return all_here(warp, i, kAllLanes, lanes, what);
  }

  // What a lane does itself.
  Access by_lane(Warp& warp, int lane, const char* verb) {
    Record record = record_of(warp.id, lane, warp.clock.now);
    return {record, record >> kClockBits, &warp.clock.known.generic, nullptr, lane, verb};
  }

  // What the copy engine does for a lane: after what the lane knows, and what is written only behind a proxy fence.
  Access for_lane(Warp& warp, int lane, int agent, uint32_t clock, const char* verb) {
    Access access = by_lane(warp, lane, verb);
    access.record = record_of(agent, kSeveralLanes, clock);
    access.fenced = &warp.clock.known.async;
    return access;
  }

  std::string agent_name(int agent) const {
    int warps_ = warps.size(), groups = warpgroups.size();
    if (agent < warps_) return "warp " + std::to_string(agent);
    if (agent < kFirstProducts + groups) return "a product of warpgroup " + std::to_string(agent - kFirstProducts);
    if (agent < bulk_agents + warps_) return "a reduction of warp " + std::to_string(agent - bulk_agents);
    for (const Mbarrier& m : mbarriers)
      if (m.agent == agent) return "a copy for the mbarrier at byte " + std::to_string(m.address);
    return "something";
  }
};

}  // namespace ptx
