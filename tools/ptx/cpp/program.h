// A kernel as tools/ptx/program.py lays it out: instructions, their operands and settings, and what is counted.
#pragma once
#include <cstdint>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;

struct Instruction {
  int32_t op;        // index into the list of opcodes
  int32_t guard;     // register of the predicate in front, -1: none
  int32_t negated;   // whether the predicate must be false
  int32_t target;    // index of the instruction that a branch goes to
  int32_t operands;  // index of the first in Program::operands
  int32_t results;   // how many of them are written; these come first
  int32_t count;     // of all operands
  int32_t settings;  // index of the first in Program::settings
  int64_t offset;    // of an address, or the number in the instruction
};

// Of one instruction. Mirrored in tools/ptx/counts.py.
struct Count {
  int64_t executed;    // by warps
  int64_t wavefronts;  // of shared memory
  int64_t needed;      // wavefronts, had there been no bank conflict
  int64_t sectors;     // of 32 bytes of global memory
  int64_t bytes;       // of global memory, as asked for by each lane
};

// What a register holds when a block starts.
struct Initial {
  int32_t offset, wide, kind, unused;
  uint64_t value;
};
enum InitialKind { kConstant, kThread, kLane, kWarp, kBlockX, kBlockY, kBlockZ, kGridX, kGridY, kGridZ, kThreads };

struct Program {
  const Instruction* instructions;
  int64_t length;
  const int32_t* operands;  // offsets in the registers of a warp, in words
  const int32_t* settings;
  const Initial* initial;
  int64_t initials;
  int64_t words;   // of the registers of a warp
  int64_t shared;  // bytes of a block
  int64_t threads;
  int64_t products;  // whether wgmma is used
  int64_t unit;      // bytes of the smallest access to shared memory
  int64_t local;     // bytes of a lane
};

}  // namespace ptx
