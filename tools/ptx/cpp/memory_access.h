// Loads, stores and atomic operations of every state space.
#pragma once
#include "block.h"

namespace ptx {

enum Space { kGlobal, kShared, kParam, kGeneric, kLocal };

// ld and st. Settings: state space, registers a lane, bytes of each, whether they are signed, whether registers are
// wide. Operands: the data and the address; of a load the data first, of a store behind.
struct Move {
  Space space;
  int vector, bytes;
  bool sign, wide;
  const int32_t* data;
  int32_t address;
};

inline Move move_of(const Block& block, const Instruction& i, bool load) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  return {Space(s[0]), s[1], s[2], s[3] != 0, s[4] != 0, load ? o : o + 1, load ? o[s[1]] : o[0]};
}

inline uint64_t from_memory(const void* memory, int bytes, bool sign) {
  switch (bytes) {
    case 1: {
      uint8_t x;
      memcpy(&x, memory, 1);
      return sign ? uint64_t(int64_t(int8_t(x))) : x;
    }
    case 2: {
      uint16_t x;
      memcpy(&x, memory, 2);
      return sign ? uint64_t(int64_t(int16_t(x))) : x;
    }
    case 4: {
      uint32_t x;
      memcpy(&x, memory, 4);
      return sign ? uint64_t(int64_t(int32_t(x))) : x;
    }
    default: {
      uint64_t x;
      memcpy(&x, memory, 8);
      return x;
    }
  }
}

inline void load_lane(const Warp& warp, const Move& move, int lane, const uint8_t* memory) {
  for (int v = 0; v < move.vector; v++) {
    uint64_t value = from_memory(memory + v * move.bytes, move.bytes, move.sign);
    if (move.wide) warp.wide(move.data[v])[lane] = value;
    else warp.reg(move.data[v])[lane] = uint32_t(value);
  }
}

inline void store_lane(const Warp& warp, const Move& move, int lane, uint8_t* memory) {
  for (int v = 0; v < move.vector; v++) {
    uint64_t value = move.wide ? warp.wide(move.data[v])[lane] : warp.reg(move.data[v])[lane];
    memcpy(memory + v * move.bytes, &value, move.bytes);
  }
}

inline void check_aligned(uint64_t at, unsigned bytes, int lane, const char* what) {
  if (at % bytes) fault(lane, "misaligned %s: %u bytes at address 0x%llx", what, bytes, (unsigned long long)at);
}

inline void check_shared(const Block& block, uint32_t at, unsigned bytes, int lane, const char* what) {
  if (uint64_t(at) + bytes > block.shared.size())
    fault(lane, "%s out of range: %u bytes at byte %u of shared memory, which has %zu", what, bytes, at,
          block.shared.size());
}

inline void shared_move(Block& block, Warp& warp, const Instruction& i, uint32_t lanes, const Move& move,
                        const uint32_t* at, bool load) {
  unsigned bytes = move.vector * move.bytes;
  const char* verb = load ? "load" : "store";
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    check_aligned(at[lane], bytes, lane, load ? "load of shared memory" : "store to shared memory");
    check_shared(block, at[lane], bytes, lane, verb);
    uint8_t* memory = block.shared.data() + at[lane];
    Access access = block.by_lane(warp, lane, verb);
    if (load) {
      block.shadow.read(at[lane], bytes, access);
      load_lane(warp, move, lane, memory);
    } else {
      uint8_t data[16];
      store_lane(warp, move, lane, data);
      block.shadow.write(at[lane], bytes, access, data, memory);
      memcpy(memory, data, bytes);
    }
  }
  warp.clock.unsynchronised |= lanes;
  count_wavefronts(at, lanes, bytes, block.count(i));
}

inline void global_move(Block& block, Warp& warp, const Instruction& i, uint32_t lanes, const Move& move,
                        const uint64_t* at, bool load) {
  unsigned bytes = move.vector * move.bytes;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    check_aligned(at[lane], bytes, lane, load ? "load of global memory" : "store to global memory");
    Access access = block.by_lane(warp, lane, load ? "load" : "store");
    uint8_t *memory = reinterpret_cast<uint8_t*>(at[lane]), data[16];
    if (!load) store_lane(warp, move, lane, data);
    block.global.access(at[lane], bytes, access, !load, false, load ? nullptr : data);
    if (load) load_lane(warp, move, lane, memory);
    else memcpy(memory, data, bytes);
  }
  warp.clock.unsynchronised |= lanes;
  count_sectors(at, lanes, bytes, block.count(i));
}

inline void parameter_load(Block& block, Warp& warp, uint32_t lanes, const Move& move, const uint64_t* at) {
  unsigned bytes = move.vector * move.bytes;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    uint64_t offset = at[lane] & ~kWindowMask;
    check_aligned(offset, bytes, lane, "load of a parameter");
    if (offset + bytes > block.parameters.size())
      fault(lane, "load out of range: byte %llu of the parameters", (unsigned long long)offset);
    load_lane(warp, move, lane, block.parameters.data() + offset);
  }
}

// Local memory is a lane's own.
inline void local_move(Warp& warp, uint32_t lanes, const Move& move, const uint64_t* at, bool load) {
  unsigned bytes = move.vector * move.bytes;
  size_t size = warp.local.size() / kLanes;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    uint64_t offset = at[lane] & ~kWindowMask;
    check_aligned(offset, bytes, lane, load ? "load of local memory" : "store to local memory");
    if (offset + bytes > size)
      fault(lane, "%s out of range: %u bytes at byte %llu of local memory, which has %zu", load ? "load" : "store",
            bytes, (unsigned long long)offset, size);
    uint8_t *memory = &warp.local[lane * size + offset], *written = &warp.local_written[lane * size + offset];
    if (load && !std::all_of(written, written + bytes, [](uint8_t x) { return x != 0; }))
      fault(lane, "load of local memory that nobody wrote, at byte %llu", (unsigned long long)offset);
    if (load) load_lane(warp, move, lane, memory);
    else store_lane(warp, move, lane, memory), std::fill_n(written, bytes, 1);
  }
}

inline void move(Block& block, Warp& warp, const Instruction& i, uint32_t lanes, bool load) {
  Move move = move_of(block, i, load);
  uint64_t at[kLanes];
  bool narrow = block.settings(i)[5] == 0;  // the address is a register of 32 bits
  for (int lane = 0; lane < kLanes; lane++)
    at[lane] = (narrow ? warp.reg(move.address)[lane] : warp.wide(move.address)[lane]) + i.offset;
  if (move.space == kGeneric) {
    uint64_t window = at[first_lane(lanes)] & kWindowMask;
    for (int lane = 0; lane < kLanes; lane++)
      if (lanes >> lane & 1 && (at[lane] & kWindowMask) != window)
        fault(lane, "generic addresses of one instruction are in several state spaces");
    move.space = window == kSharedWindow  ? kShared
                 : window == kParamWindow ? kParam
                 : window == kLocalWindow ? kLocal
                                          : kGlobal;
  }
  if (move.space == kGlobal) return global_move(block, warp, i, lanes, move, at, load);
  if (move.space == kLocal) return local_move(warp, lanes, move, at, load);
  if (move.space == kParam && load) return parameter_load(block, warp, lanes, move, at);
  if (move.space == kParam) fault(first_lane(lanes), "store to a parameter");
  uint32_t shared_at[kLanes];
  for (int lane = 0; lane < kLanes; lane++) shared_at[lane] = uint32_t(at[lane]);
  shared_move(block, warp, i, lanes, move, shared_at, load);
}

inline void do_load(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  move(block, warp, i, lanes, true);
}
inline void do_store(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  move(block, warp, i, lanes, false);
}

// atom and red. Settings: operation, type, whether there is a result, whether it is of shared memory, whether the
// address is wide. Operands: the result, if any, the address, b, and c of cas. They order nothing but each other.
enum AtomicOperation {
  kAtomicAdd,
  kAtomicMin,
  kAtomicMax,
  kAtomicAnd,
  kAtomicOr,
  kAtomicXor,
  kAtomicExchange,
  kAtomicCompare
};

template <class T>
inline T atomic_result(AtomicOperation operation, T old, T b, T c) {
  switch (operation) {
    case kAtomicAdd: return old + b;
    case kAtomicMin: return old < b ? old : b;
    case kAtomicMax: return old > b ? old : b;
    case kAtomicExchange: return b;
    case kAtomicCompare: return old == b ? c : old;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (operation == kAtomicAnd) return old & b;
    if (operation == kAtomicOr) return old | b;
    return old ^ b;
  }
  return old;
}

template <class T>
inline void atomic(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  bool result = s[2] != 0, shared = s[3] != 0, wide = s[4] != 0;
  int32_t address = o[result], b = o[result + 1], c = o[i.count - 1];
  uint64_t at[kLanes] = {};
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    at[lane] = (wide ? warp.wide(address)[lane] : warp.reg(address)[lane]) + i.offset;
    check_aligned(at[lane], sizeof(T), lane, "atomic operation");
    Access access = block.by_lane(warp, lane, "atomic operation");
    if (shared) {
      check_shared(block, uint32_t(at[lane]), sizeof(T), lane, "atomic operation");
      block.shadow.atomic(uint32_t(at[lane]), sizeof(T), access);
    } else {
      block.global.access(at[lane], sizeof(T), access, true, true);
    }
    T old;
    void* memory = shared ? static_cast<void*>(&block.shared[uint32_t(at[lane])]) : reinterpret_cast<void*>(at[lane]);
    memcpy(&old, memory, sizeof(T));
    T value = atomic_result<T>(AtomicOperation(s[0]), old, Lane<T>::read(warp.reg(b), lane),
                               Lane<T>::read(warp.reg(c), lane));
    memcpy(memory, &value, sizeof(T));
    if (result) Lane<T>::write(warp.reg(o[0]), lane, old);
  }
  warp.clock.unsynchronised |= lanes;
  if (!shared) return count_sectors(at, lanes, sizeof(T), block.count(i));
  // At least these: lanes that meet in a word take turns.
  uint32_t shared_at[kLanes];
  std::copy_n(at, kLanes, shared_at);
  count_wavefronts(shared_at, lanes, sizeof(T), block.count(i));
}

inline void do_atomic(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  switch (block.settings(i)[1]) {
    case 0: return atomic<uint32_t>(block, warp, i, lanes);
    case 1: return atomic<int32_t>(block, warp, i, lanes);
    case 2: return atomic<uint64_t>(block, warp, i, lanes);
    case 3: return atomic<int64_t>(block, warp, i, lanes);
    case 4: return atomic<float>(block, warp, i, lanes);
    default: return atomic<double>(block, warp, i, lanes);
  }
}

// atom and red of two or four neighbouring float32 of global memory: each is added to by itself. Settings: how many,
// whether there is a result. Operands: the results, if any, the address, what is added.
inline void do_atomic_vector(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  int count = s[0], results = s[1] ? count : 0;
  uint64_t at[kLanes] = {};
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    at[lane] = warp.wide(o[results])[lane] + i.offset;
    check_aligned(at[lane], count * sizeof(float), lane, "atomic operation");
    block.global.access(at[lane], count * sizeof(float), block.by_lane(warp, lane, "atomic operation"), true, true);
    float values[4];
    memcpy(values, reinterpret_cast<void*>(at[lane]), count * sizeof(float));
    for (int n = 0; n < count; n++) {
      float sum = values[n] + Lane<float>::read(warp.reg(o[results + 1 + n]), lane);
      if (results) Lane<float>::write(warp.reg(o[n]), lane, values[n]);
      values[n] = sum;
    }
    memcpy(reinterpret_cast<void*>(at[lane]), values, count * sizeof(float));
  }
  warp.clock.unsynchronised |= lanes;
  count_sectors(at, lanes, count * sizeof(float), block.count(i));
}

}  // namespace ptx
