// The functions of csrc/cuda/primitives.h for a build without nvcc: they run on the emulated machine.
#pragma once
#include "machine.h"

#define DK_DEVICE inline
#define DK_UNROLL

namespace dk {

using emulation::machine;

inline int thread_index() { return machine.thread(); }
inline int block_index() { return machine.block(); }

template <class T>
T load_global(const T* address) {
  machine.check_global(address, sizeof(T), false);
  return *address;
}
template <class T>
void store_global(T* address, T value) {
  machine.check_global(address, sizeof(T), true);
  *address = value;
}

// ---- Registers of a warp

template <class T>
T exchange(T value, int lane, const char* what) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = machine.meet(what, bits)[lane];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int uniform(int value) { return exchange(value, 0, "a broadcast"); }
inline float shuffle_xor(float value, int lanes) {
  return exchange(value, (machine.thread() & 31) ^ lanes, "a shuffle");
}
inline uint32_t shuffle_xor(uint32_t value, int lanes) {
  return exchange(value, (machine.thread() & 31) ^ lanes, "a shuffle");
}
inline uint32_t ballot(bool flag) {
  uint32_t bits = 0;
  const auto& flags = machine.meet("a ballot", flag);
  for (int lane = 0; lane < 32; lane++) bits |= (uint32_t)flags[lane] << lane;
  return bits;
}
inline void sync_warp() { machine.meet("a warp barrier", 0, true); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float minus_infinity() { return -HUGE_VALF; }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float log2_exact(float x) { return std::log2(x); }

inline uint32_t computed_anew(uint32_t value) { return value; }

// ---- Shared memory

inline uint32_t shared_base() { return emulation::Machine::kSharedBase; }
inline void store_shared(uint32_t address, float value) {
  std::memcpy(machine.shared_access(address, 4, true), &value, 4);
}
inline void store_shared(uint32_t address, uint32_t value) {
  std::memcpy(machine.shared_access(address, 4, true), &value, 4);
}
inline void store_shared_half(uint32_t address, uint32_t value) {
  std::memcpy(machine.shared_access(address, 2, true), &value, 2);
}
inline void store_shared_floats(uint32_t address, float a, float b, float c, float d) {
  const float values[4] = {a, b, c, d};
  std::memcpy(machine.shared_access(address, 16, true), values, 16);
}
inline void store_shared_4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t values[4] = {a, b, c, d};
  std::memcpy(machine.shared_access(address, 16, true), values, 16);
}
inline uint32_t load_shared(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, machine.shared_access(address, 4, false), 4);
  return value;
}
inline void load_shared_2(uint32_t address, float& a, float& b) {
  float values[2];
  std::memcpy(values, machine.shared_access(address, 8, false), 8);
  a = values[0], b = values[1];
}
inline void load_shared_4(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  uint32_t values[4];
  std::memcpy(values, machine.shared_access(address, 16, false), 16);
  a = values[0], b = values[1], c = values[2], d = values[3];
}
inline void load_shared_floats(uint32_t address, float& a, float& b, float& c, float& d) {
  float values[4];
  std::memcpy(values, machine.shared_access(address, 16, false), 16);
  a = values[0], b = values[1], c = values[2], d = values[3];
}
inline void fence_async() { machine.fence(); }

// ---- Barriers

inline void sync_block() { machine.sync_threads(0, machine.threads()); }
inline void sync_threads(int barrier, int threads) { machine.sync_threads(barrier, threads); }
inline void barrier_init(uint32_t barrier, int arrivals) { machine.barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { machine.barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint32_t barrier, int bytes) { machine.barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { machine.barrier_wait(barrier, parity); }

// ---- The copy engine

inline void copy_box(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
  machine.copy(target, map, barrier, {x, y, z, w, 0}, 4);
}
inline void copy_box(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
  machine.copy(target, map, barrier, {x, y, z, 0, 0}, 3);
}

// ---- Reductions

inline void reduce_add(float* target, uint32_t source, int bytes) { machine.reduce(target, source, bytes); }
inline void reduce_commit() { machine.reduce_commit(); }
inline void reduce_wait_read() { machine.reduce_wait(false); }
inline void reduce_wait() { machine.reduce_wait(true); }

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

// ---- Products

inline void product_fence() { machine.product_fence(); }
inline void product_commit() { machine.product_commit(); }
template <int kUnfinished>
void product_wait() {
  machine.product_wait(kUnfinished);
}

template <emulation::Format kFormat>
struct EmulatedProducts {
  template <bool kAccumulate, bool kTransposed>
  static void product(float (&d)[32], const uint32_t* a, uint64_t b) {
    machine.product({kFormat, d, 64, kAccumulate, false, kTransposed, true, {a[0], a[1], a[2], a[3]}, a, 0, b, {}});
  }
  template <bool kAccumulate, bool kFirstTransposed = false, bool kTransposed = false>
  static void product(float (&d)[32], uint64_t a, uint64_t b) {
    machine.product({kFormat, d, 64, kAccumulate, kFirstTransposed, kTransposed, false, {}, nullptr, a, b, {}});
  }
  static void product_of_8(float (&d)[4], const uint32_t* a, uint64_t b) {
    machine.product({kFormat, d, 8, true, false, false, true, {a[0], a[1], a[2], a[3]}, a, 0, b, {}});
  }
};

struct BFloat16 : EmulatedProducts<emulation::Format::kBFloat16> {
  static uint32_t pack(float low, float high) {
    return emulation::bfloat16_bits(low) | (uint32_t)emulation::bfloat16_bits(high) << 16;
  }
  static void unpack(uint32_t pair, float& low, float& high) {
    low = emulation::bfloat16_value((uint16_t)pair), high = emulation::bfloat16_value((uint16_t)(pair >> 16));
  }
};

struct Float16 : EmulatedProducts<emulation::Format::kFloat16> {
  static uint32_t pack(float low, float high) {
    return emulation::float16_bits(low) | (uint32_t)emulation::float16_bits(high) << 16;
  }
  static void unpack(uint32_t pair, float& low, float& high) {
    low = emulation::float16_value((uint16_t)pair), high = emulation::float16_value((uint16_t)(pair >> 16));
  }
};

}  // namespace dk
