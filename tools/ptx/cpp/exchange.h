// Lanes of a warp that look at each other's registers.
#pragma once
#include "block.h"

namespace ptx {

// The lanes that the instruction names must be those that execute it.
inline bool members_here(Block& block, Warp& warp, const Instruction& i, int32_t mask, uint32_t lanes,
                         const char* what) {
  return block.all_here(warp, i, warp.reg(mask)[first_lane(lanes)], lanes, what);
}

enum ShuffleMode { kButterfly, kUp, kDown, kIndex };

// shfl.sync. Settings: mode, whether there is a predicate. Operands: result, predicate, a, b, c, members.
inline void do_shuffle(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i), *in = o + 1 + s[1];
  if (!members_here(block, warp, i, in[3], lanes, "shfl.sync")) return;
  uint32_t moved[kLanes], inside = 0;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    int b = warp.reg(in[1])[lane] & 31, c = warp.reg(in[2])[lane];
    int clamp = c & 31, segment = c >> 8 & 31;
    int last = (lane & segment) | (clamp & ~segment), first = lane & segment, from = lane;
    switch (s[0]) {
      case kButterfly: from = lane ^ b; break;
      case kUp: from = lane - b; break;
      case kDown: from = lane + b; break;
      default: from = first | (b & ~segment);
    }
    bool valid = s[0] == kUp ? from >= last : from <= last;
    if (!valid) from = lane;
    else inside |= 1u << lane;
    if (!(lanes >> from & 1)) fault(lane, "shfl.sync reads lane %d, which does not execute it", from);
    moved[lane] = warp.reg(in[0])[from];
  }
  for (int lane = 0; lane < kLanes; lane++)
    if (lanes >> lane & 1) warp.reg(o[0])[lane] = moved[lane];
  if (s[1]) warp.reg(o[1])[0] = (warp.reg(o[1])[0] & ~lanes) | inside;
}

// vote.sync. Settings: 0 ballot, 1 any, 2 all, 3 uni. Operands: result, predicate, members.
inline void do_vote(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t* o = block.operands(i);
  if (!members_here(block, warp, i, o[2], lanes, "vote.sync")) return;
  uint32_t ballot = warp.reg(o[1])[0];
  if (block.settings(i)[1]) ballot = ~ballot;
  ballot &= lanes;
  uint32_t* result = warp.reg(o[0]);
  bool any = ballot != 0, all = ballot == lanes;
  switch (block.settings(i)[0]) {
    case 0:
      for (int lane = 0; lane < kLanes; lane++)
        if (lanes >> lane & 1) result[lane] = ballot;
      return;
    case 1: result[0] = any ? result[0] | lanes : result[0] & ~lanes; return;
    case 2: result[0] = all ? result[0] | lanes : result[0] & ~lanes; return;
    default: result[0] = all || !any ? result[0] | lanes : result[0] & ~lanes;
  }
}

enum Reduction { kReduceAdd, kReduceMin, kReduceMax, kReduceAnd, kReduceOr, kReduceXor };

// redux.sync. Settings: operation, signed. Operands: result, value, members.
inline void do_redux(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  if (!members_here(block, warp, i, o[2], lanes, "redux.sync")) return;
  uint32_t total = warp.reg(o[1])[first_lane(lanes)];
  for (int lane = first_lane(lanes) + 1; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t x = warp.reg(o[1])[lane];
    bool below = s[1] ? int32_t(x) < int32_t(total) : x < total;
    switch (s[0]) {
      case kReduceAdd: total += x; break;
      case kReduceMin: total = below ? x : total; break;
      case kReduceMax: total = below ? total : x; break;
      case kReduceAnd: total &= x; break;
      case kReduceOr: total |= x; break;
      default: total ^= x;
    }
  }
  for (int lane = 0; lane < kLanes; lane++)
    if (lanes >> lane & 1) warp.reg(o[0])[lane] = total;
}

// elect.sync: the lowest lane. Operands: its number, the predicate, members.
inline void do_elect(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t* o = block.operands(i);
  if (!members_here(block, warp, i, o[2], lanes, "elect.sync")) return;
  for (int lane = 0; lane < kLanes; lane++)
    if (lanes >> lane & 1) warp.reg(o[0])[lane] = first_lane(lanes);
  warp.reg(o[1])[0] = (warp.reg(o[1])[0] & ~lanes) | (lanes & -lanes);
}

// mov of a vector: two halves of a register apart, or together. Settings: bytes of a half.
inline void do_join(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t* o = block.operands(i);
  bool wide = block.settings(i)[0] == 4;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t low = warp.reg(o[1])[lane], high = warp.reg(o[2])[lane];
    if (wide) warp.wide(o[0])[lane] = low | uint64_t(high) << 32;
    else warp.reg(o[0])[lane] = (low & 0xffff) | high << 16;
  }
}
inline void do_part(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t* o = block.operands(i);
  bool wide = block.settings(i)[0] == 4;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    uint64_t value = wide ? warp.wide(o[2])[lane] : warp.reg(o[2])[lane];
    warp.reg(o[0])[lane] = wide ? uint32_t(value) : uint32_t(value & 0xffff);
    warp.reg(o[1])[lane] = wide ? value >> 32 : value >> 16;
  }
}

}  // namespace ptx
