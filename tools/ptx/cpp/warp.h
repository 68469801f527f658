// One warp: its registers, the paths that its lanes are on, and what it waits for.
#pragma once
#include <climits>
#include <vector>

#include "clocks.h"
#include "program.h"

namespace ptx {

// Lanes that are at the same instruction.
struct Path {
  int32_t pc;
  uint32_t lanes;
  int64_t asked_at;  // number of the event after which it could not go on; -1: it can
  bool meets;        // it waits for the other lanes of the warp
};

// A warp that waits for its turn could go on, and would find what it found.
enum class Ask { kNothing, kEvent, kBarrier, kTurn };

struct Warp {
  int id = 0;
  uint32_t* registers = nullptr;
  // The path that runs: always the one with the lowest program counter among those that can, so that lanes meet again
  // at the first instruction that both reach.
  int32_t pc = 0;
  uint32_t active = kAllLanes;
  int32_t meeting = INT_MAX;  // the lowest program counter of the other paths
  std::vector<Path> others;
  uint32_t exited = 0;

  Ask waits_for = Ask::kNothing;
  int64_t asked_at = -1;  // number of the event after which it found nothing
  int32_t waits_at = 0;   // instruction, for messages
  int32_t barrier = -1;   // number of the named barrier it waits at
  WarpClock clock;

  // cp.async: copies not yet committed, and groups of them, oldest first.
  struct Copy {
    uint32_t target, bytes, real;
    uint64_t source;
    int lane;
  };
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;

  // wgmma: which registers a product in flight uses, 0: none, else the instruction + 1; when each was last accessed;
  // when the last wgmma.fence was.
  std::vector<int32_t> busy;  // negative: only read by it
  std::vector<int64_t> busy_until, accessed;
  std::vector<int32_t> busy_list;
  int64_t executed = 0, fenced = -1;
  int64_t product = 0;                  // of the warpgroup's products, the number of the next that this warp issues
  std::vector<int64_t> product_groups;  // for each committed group in flight, the number behind its last product

  // cp.reduce.async.bulk: groups in flight
  uint32_t bulk_clock = 0, bulk_lanes = 0;
  std::vector<uint32_t> bulk_groups;

  // Local memory, lane by lane, and which bytes of it were written.
  std::vector<uint8_t> local, local_written;

  int registers_per_thread = 0;

  uint32_t* reg(int32_t offset) const { return registers + offset; }
  uint64_t* wide(int32_t offset) const { return reinterpret_cast<uint64_t*>(registers + offset); }

  uint32_t live() const { return ~exited; }

  void diverge(int32_t target, uint32_t taken) {
    others.push_back({pc, active & ~taken, -1, false});
    others.push_back({target, taken, -1, false});
    active = 0;
    choose();
  }

  // Lanes leave for good.
  void leave(uint32_t lanes) {
    exited |= lanes;
    active &= ~lanes;
    if (active == 0 && !others.empty()) choose();
  }

  // Whether other lanes of the warp may still come to the instruction at hand: they run, or wait for something else.
  bool others_may_come(int64_t event) const {
    for (const Path& path : others)
      if (path.asked_at != event || !path.meets) return true;
    return false;
  }

  bool done() const { return exited == kAllLanes; }

  // The running path cannot execute its instruction before something happens; the warp waits if that is so of all
  // paths.
  void suspend(int64_t event, bool meets) {
    waits_at = --pc;
    bool others_can = false;
    for (Path& path : others) {
      if (path.asked_at != event) path.asked_at = -1;
      others_can |= path.asked_at < 0;
    }
    others.push_back({pc, active, event, meets});
    active = 0;
    choose();
    if (!others_can) waits_for = Ask::kEvent, asked_at = event;
  }

  // Take the lowest path that can run; if none can, the lowest. Paths at the same instruction become one.
  void choose() {
    if (active) others.push_back({pc, active, -1, false});
    size_t best = 0;
    for (size_t i = 1; i < others.size(); i++) {
      const Path &a = others[i], &b = others[best];
      bool waits = a.asked_at >= 0, best_waits = b.asked_at >= 0;
      if (waits != best_waits ? best_waits : a.pc < b.pc) best = i;
    }
    pc = others[best].pc, active = 0, meeting = INT_MAX;
    size_t kept = 0;
    for (const Path& path : others) {
      if (path.pc == pc) active |= path.lanes;
      else others[kept++] = path, meeting = std::min(meeting, path.pc > pc ? path.pc : INT_MAX);
    }
    others.resize(kept);
  }

  void wake() {
    waits_for = Ask::kNothing;
    for (Path& path : others) path.asked_at = -1;
    if (!others.empty()) choose();
  }
};

}  // namespace ptx
