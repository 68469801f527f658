// Apply a function to the registers of 32 lanes. The loops are simple so that the compiler makes vectors of them.
#pragma once
#include <cstring>

#include "warp.h"

namespace ptx {

inline uint32_t bits_or_nan(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return value == value ? bits : 0x7fffffff;
}

// How a type lies in registers: 8 bytes a lane for the wide ones; a predicate is one bit a lane.
template <class T>
struct Lane {
  static T read(const uint32_t* r, int lane) {
    if constexpr (std::is_same_v<T, bool>) return r[0] >> lane & 1;
    else if constexpr (sizeof(T) == 8) return reinterpret_cast<const T*>(r)[lane];
    else if constexpr (sizeof(T) == 4) return reinterpret_cast<const T*>(r)[lane];
    else return T(r[lane]);
  }
  // `keep` lanes hold what they held.
  static void write(uint32_t* r, int lane, T value) {
    // A processor's NaN is that of an operand, and of which one depends on their order; PTX knows one only.
    if constexpr (std::is_same_v<T, float>) reinterpret_cast<uint32_t*>(r)[lane] = bits_or_nan(value);
    else if constexpr (sizeof(T) == 8 || sizeof(T) == 4) reinterpret_cast<T*>(r)[lane] = value;
    else r[lane] = std::make_unsigned_t<T>(value);
  }
};

template <class Signature>
struct Each;

template <class R, class... A>
struct Each<R(A...)> {
  template <class F, size_t... kIndex>
  static void run(uint32_t* result, const uint32_t* const* sources, uint32_t lanes, F f,
                  std::index_sequence<kIndex...>) {
    if constexpr (std::is_same_v<R, bool>) {
      uint32_t found = 0;
#pragma GCC ivdep
      for (int l = 0; l < kLanes; l++) found |= uint32_t(bool(f(Lane<A>::read(sources[kIndex], l)...))) << l;
      result[0] = (found & lanes) | (result[0] & ~lanes);
    } else if (lanes == kAllLanes) {
#pragma GCC ivdep
      for (int l = 0; l < kLanes; l++) Lane<R>::write(result, l, R(f(Lane<A>::read(sources[kIndex], l)...)));
    } else {
      for (int l = 0; l < kLanes; l++)
        if (lanes >> l & 1) Lane<R>::write(result, l, R(f(Lane<A>::read(sources[kIndex], l)...)));
    }
  }
};

template <class Signature, class F>
inline void each(Warp& warp, const Program& program, const Instruction& instruction, uint32_t lanes, F f);

template <class R, class... A, class F>
inline void each_of(R (*)(A...), Warp& warp, const int32_t* operands, uint32_t lanes, F f) {
  const uint32_t* sources[sizeof...(A)];
  for (size_t i = 0; i < sizeof...(A); i++) sources[i] = warp.reg(operands[i + 1]);
  Each<R(A...)>::run(warp.reg(operands[0]), sources, lanes, f, std::index_sequence_for<A...>());
}

// each<int(int, int)>(...) applies f to two registers of each lane and stores what it returns.
template <class Signature, class F>
inline void each(Warp& warp, const Program& program, const Instruction& instruction, uint32_t lanes, F f) {
  each_of(static_cast<Signature*>(nullptr), warp, program.operands + instruction.operands, lanes, f);
}

}  // namespace ptx
