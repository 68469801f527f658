// The past of shared memory: who wrote an element last, who has read it since. Two accesses of which one writes, and
// that nothing orders, are a race (FastTrack, Flanagan and Freund 2009, with one clock per warp).
#pragma once
#include <map>
#include <vector>

#include "chunks.h"
#include "clocks.h"
#include "program.h"

namespace ptx {

// One access, by one lane or by an asynchronous agent.
struct Access {
  Record record;
  uint32_t owner;       // agent and lane, whose own accesses are always ordered; ~0: nobody
  const Known* past;    // what is ordered before it
  const Known* fenced;  // of an access by the async proxy: what a proxy fence is between; else null
  int lane;             // for messages
  const char* verb;     // "store", "copy" and so on

  bool after(Record old) const { return past->includes(old) || old >> kClockBits == owner; }
  bool after_write(Record old) const { return after(old) && (fenced == nullptr || fenced->includes(old)); }
};

// A race, for the block to put into words: it knows which agent is what.
struct Conflict {
  int agent, lane;
  uint64_t byte;
  Access access;
  const char* did;
  bool fence;  // ordered, but for the missing fence.proxy.async
};

// Who has read an element since it was written, by agent, when there are more than a cell holds.
class ReaderPool {
 public:
  void reset(int agents) {
    agents_ = agents;
    records_.clear(), free_.clear();
  }
  uint32_t allot() {
    if (free_.empty()) {
      records_.resize(records_.size() + agents_);
      return records_.size() / agents_;
    }
    uint32_t found = free_.back();
    free_.pop_back();
    std::fill_n(of(found), agents_, 0);
    return found;
  }
  void give_back(uint32_t readers) { free_.push_back(readers); }
  Record* of(uint32_t readers) { return &records_[(readers - 1) * size_t(agents_)]; }
  int agents() const { return agents_; }

 private:
  int agents_ = 0;
  std::vector<Record> records_;
  std::vector<uint32_t> free_;
};

class Shadow {
 public:
  Shadow() = default;
  Shadow(const Shadow&) = delete;

  // `unit`: bytes of the smallest element that the kernel accesses.
  void reset(size_t bytes, unsigned unit, int agents) {
    chunks_.reset(bytes, unit);
    pool_.reset(agents);
    atomics_.clear();
  }

  void read(uint32_t at, unsigned bytes, const Access& access) {
    if (!atomics_.empty()) check_atomics(at, bytes, access, false);
    chunks_.for_each(at, bytes, [&](Cell& cell, uint64_t byte) { read_cell(cell, access, byte); });
  }

  // `data` are the bytes to be written, `memory` those that are there: a store of what another lane stores as well is
  // no race, since Triton writes values that several warps hold from each of them. Null: never the same.
  void write(uint32_t at, unsigned bytes, const Access& access, const uint8_t* data = nullptr,
             const uint8_t* memory = nullptr) {
    if (!atomics_.empty()) check_atomics(at, bytes, access, true);
    bool same = data != nullptr && std::equal(data, data + bytes, memory);
    chunks_.for_each(at, bytes, [&](Cell& cell, uint64_t byte) { write_cell(cell, access, byte, same); });
  }

  // An atomic operation races with no other one, but with every other access that nothing orders.
  void atomic(uint32_t at, unsigned bytes, const Access& access) {
    for (uint32_t word = at / 4; word < (at + bytes) / 4; word++) {
      std::vector<Record>& earlier = atomics_[word];
      chunks_.for_each(4 * word, 4, [&](Cell& cell, uint64_t byte) {
        if (cell.write == 0) nobody_wrote(access, byte);
        if (!earlier.empty()) cell.write = access.record;
        write_cell(cell, access, byte, false);
      });
      earlier.erase(std::remove_if(earlier.begin(), earlier.end(), [&](Record old) { return access.after(old); }),
                    earlier.end());
      earlier.push_back(access.record);
    }
  }

  // Set the past of these bytes without asking about the one they had.
  void overwrite(uint32_t at, unsigned bytes, Record record) {
    chunks_.for_each(at, bytes, [&](Cell& cell, uint64_t) { forget(cell), cell.write = record; });
  }

  Record last_write(uint32_t at) const { return chunks_.at(at).write; }

  int64_t excused = 0;  // writes that would be races with others, were the values not the same

 private:
  static constexpr int kReads = 4;
  struct Cell {
    Record write = 0;
    uint32_t parts = 0;
    Record reads[kReads] = {};
    uint32_t more = 0;  // further readers, in the pool

    bool equal(const Cell& other) const {
      return write == other.write && std::equal(reads, reads + kReads, other.reads) && !more && !other.more;
    }
  };
  friend class Chunks<Cell, Shadow>;

  void copied(Cell& cell) {
    if (cell.more == 0) return;
    uint32_t readers = pool_.allot();
    std::copy_n(pool_.of(cell.more), pool_.agents(), pool_.of(readers));
    cell.more = readers;
  }

  void read_cell(Cell& cell, const Access& access, uint64_t byte) {
    if (!access.after_write(cell.write)) conflict(access, byte, cell.write, "wrote");
    if (cell.write == 0) nobody_wrote(access, byte);
    for (Record& old : cell.reads)
      if (replace(old, access)) return;
    if (cell.more == 0) cell.more = pool_.allot();
    replace(pool_.of(cell.more)[agent_of(access.record)], access);
  }

  // Let a new read take the place of an older one, if the older one lies in its past or is of the same agent.
  static bool replace(Record& old, const Access& access) {
    if (old == access.record) return true;
    if (access.after(old)) {
      old = access.record;
      return true;
    }
    if (agent_of(old) != agent_of(access.record)) return false;
    old = record_of(agent_of(old), kSeveralLanes, std::max(old & kClockMask, access.record & kClockMask));
    return true;
  }

  void write_cell(Cell& cell, const Access& access, uint64_t byte, bool same) {
    if (!access.after_write(cell.write)) {
      if (!same || agent_of(cell.write) > kLastAgent) conflict(access, byte, cell.write, "wrote");
      excused++;
    }
    for (Record old : cell.reads)
      if (!access.after(old)) conflict(access, byte, old, "read");
    for (int agent = 0; cell.more && agent < pool_.agents(); agent++)
      if (Record old = pool_.of(cell.more)[agent]; !access.after(old)) conflict(access, byte, old, "read");
    forget(cell);
    cell.write = access.record;
  }

  void forget(Cell& cell) {
    if (cell.more) pool_.give_back(cell.more);
    cell = Cell();
  }

  void check_atomics(uint32_t at, unsigned bytes, const Access& access, bool write) {
    for (uint32_t word = at / 4; word <= (at + bytes - 1) / 4; word++) {
      auto found = atomics_.find(word);
      if (found == atomics_.end()) continue;
      for (Record old : found->second)
        if (!access.after_write(old)) conflict(access, 4 * word, old, "changed atomically");
      if (write) atomics_.erase(found);
    }
  }

  [[noreturn, gnu::cold]] static void nobody_wrote(const Access& access, uint64_t byte) {
    fault(access.lane, "%s of shared memory that nobody wrote, at byte %llu", access.verb, (unsigned long long)byte);
  }

  [[noreturn, gnu::cold]] static void conflict(const Access& access, uint64_t byte, Record other, const char* did) {
    int agent = agent_of(other), lane = lane_of(other);
    unsigned long long at = byte;
    if (agent == kBarrierObject)
      fault(access.lane, "%s of shared memory that is an mbarrier, at byte %llu", access.verb, at);
    if (agent == kCopyInFlight)
      fault(access.lane, "race: %s of shared memory that cp.async is writing, at byte %llu", access.verb, at);
    throw Conflict{agent, lane, byte, access, did, access.after(other)};
  }

  Chunks<Cell, Shadow> chunks_{*this};
  ReaderPool pool_;
  // By word of 4 bytes, the atomic operations that are not in the past of a later one.
  std::map<uint32_t, std::vector<Record>> atomics_;
};

}  // namespace ptx
