// Shared memory that knows who wrote and read each word, and finds accesses that nothing orders.
//
// Order is kept in vector clocks, one per warp, with a component for each warp and one for each barrier that copies
// complete on. A barrier hands the clocks of those who arrive to those who wait. An access is a race when an earlier one
// of the same word, one of them a write, is not in the clock of the warp. Lanes of a warp are told apart by its epoch,
// which each barrier they all pass begins anew.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace emulation {

constexpr int kWarps = 16, kAgents = kWarps + 48;

struct Clock {
  std::array<uint32_t, kAgents> seen{};
  void join(const Clock& other) {
    for (int i = 0; i < kAgents; i++) seen[i] = std::max(seen[i], other.seen[i]);
  }
};

// Who accesses: a lane of a warp, or on its behalf (lane -1) the tensor cores; or the copy engine (agent >= kWarps).
struct Accessor {
  int agent;
  int lane;
  uint32_t epoch;  // of the warp
};

class SharedMemory {
 public:
  void reset(uint32_t base, uint32_t size) {
    base_ = base;
    bytes_.assign(size, 0xff);  // as floats NaN
    words_.assign(size / 4, Word());
  }
  uint8_t* at(uint32_t address) { return bytes_.data() + (address - base_); }

  // Return what is wrong with an access, or "".
  std::string range(uint32_t address, uint32_t size) const {
    if (address < base_ || address + size > base_ + bytes_.size()) return "shared address out of range";
    return address % size && size <= 16 ? "misaligned shared address" : "";
  }

  // `clock`: what the accessor knows; `now`: its own time when the read is over, which for tensor cores is later than
  // when it was asked for; `fences`: per thread, how often it made its stores visible to asynchronous reads.
  std::string read(
      uint32_t address, const Accessor& who, const Clock& clock, uint32_t now, const std::vector<uint32_t>& fences) {
    Word& word = words_[(address - base_) / 4];
    for (const Write& half : word.halves) {
      if (half.who.agent < 0) return "reads shared memory that nobody wrote";
      if (!ordered(half.who, half.time, who, clock)) return "reads what another is writing: no barrier between";
      if (who.lane < 0 && half.who.lane >= 0 && half.fences >= fences[half.who.agent * 32 + half.who.lane]) {
        return "tensor cores or the copy engine read a store that no fence made visible to them";
      }
    }
    Read& read = word.reads[who.agent];
    const bool others = read.time && read.who.epoch == who.epoch && read.who.lane != who.lane;
    read = Read{Accessor{who.agent, others ? kManyLanes : who.lane, who.epoch}, now};
    return "";
  }
  // `is_half`: only two bytes of the word, which lanes may store beside each other.
  std::string write(uint32_t address, const Accessor& who, const Clock& clock, uint32_t fences, bool is_half = false) {
    Word& word = words_[(address - base_) / 4];
    for (int i = 0; i < 2; i++) {
      Write& half = word.halves[i];
      if (is_half && i != (int)(address >> 1 & 1)) continue;
      if (half.who.agent >= 0 && !ordered(half.who, half.time, who, clock)) {
        return "writes what another is writing: no barrier between";
      }
      half = Write{who, clock.seen[who.agent], fences};
    }
    for (const Read& read : word.reads) {
      if (read.time && !ordered(read.who, read.time, who, clock)) {
        return "writes what another may still be reading: no barrier between";
      }
    }
    if (!is_half) word.reads.fill(Read());
    return "";
  }

 private:
  static constexpr int kManyLanes = -2;
  struct Read {
    Accessor who{-1, 0, 0};
    uint32_t time = 0;
  };
  struct Write {
    Accessor who{-1, 0, 0};
    uint32_t time = 0, fences = 0;
  };
  struct Word {
    std::array<Write, 2> halves;
    std::array<Read, kWarps> reads;
  };

  static bool ordered(const Accessor& earlier, uint32_t time, const Accessor& who, const Clock& clock) {
    if (earlier.agent != who.agent) return time <= clock.seen[earlier.agent];
    // Within a warp: the same lane, or a barrier in between. What tensor cores do is over when the warp has waited.
    return earlier.agent >= kWarps || earlier.lane == who.lane || earlier.lane == -1 || earlier.epoch < who.epoch;
  }

  uint32_t base_ = 0;
  std::vector<uint8_t> bytes_;
  std::vector<Word> words_;
};

// Counts words of one bank that a warp's access meets at once; 1 is without conflict.
class Banks {
 public:
  // Lanes of one instruction: 4-byte accesses are one pass, 8-byte ones two of 16 lanes, 16-byte ones four of 8.
  static int degree(const std::vector<uint32_t>& addresses, uint32_t size) {
    const size_t lanes = 32 * 4 / size;
    int worst = 0;
    for (size_t first = 0; first < addresses.size(); first += lanes) {
      std::map<uint32_t, std::set<uint32_t>> words;
      for (size_t i = first; i < std::min(first + lanes, addresses.size()); i++) {
        for (uint32_t w = addresses[i] / 4; w < (addresses[i] + size + 3) / 4; w++) words[w % 32].insert(w);
      }
      for (const auto& bank : words) worst = std::max(worst, (int)bank.second.size());
    }
    return worst;
  }
};

}  // namespace emulation
