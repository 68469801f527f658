// Matrices in the registers of a warp: ldmatrix, stmatrix and mma.sync, with the fragments that the PTX ISA draws.
#pragma once
#include "control.h"
#include "floats.h"

namespace ptx {

// ---- ldmatrix, stmatrix. Settings: matrices, transposed, loads. Operands: the matrices and the address, as of ld and
// st.

// One 8 x 8 matrix of 16-bit elements, row r of it at at[r]; lane l holds elements 2 * (l % 4) and the next of row l
// / 4.
inline void matrix_to_lanes(const Block& block, const uint32_t* at, bool transposed, uint32_t* result) {
  const uint8_t* memory = block.shared.data();
  for (int lane = 0; lane < kLanes; lane++) {
    int row = lane / 4, column = 2 * (lane % 4);
    uint16_t low, high;
    memcpy(&low, memory + (transposed ? at[column] + 2 * row : at[row] + 2 * column), 2);
    memcpy(&high, memory + (transposed ? at[column + 1] + 2 * row : at[row] + 2 * column + 2), 2);
    result[lane] = low | uint32_t(high) << 16;
  }
}
inline void lanes_to_matrix(const uint32_t* source, bool transposed, uint16_t (*matrix)[8]) {
  for (int lane = 0; lane < kLanes; lane++) {
    int row = lane / 4, column = 2 * (lane % 4);
    (transposed ? matrix[column][row] : matrix[row][column]) = source[lane] & 0xffff;
    (transposed ? matrix[column + 1][row] : matrix[row][column + 1]) = source[lane] >> 16;
  }
}

inline void do_matrix(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  const int32_t *s = block.settings(i), *o = block.operands(i);
  bool load = s[2] != 0;
  if (!block.whole_warp(warp, i, lanes, load ? "ldmatrix" : "stmatrix")) return;
  const int32_t *data = load ? o : o + 1, address = load ? o[s[0]] : o[0];
  const char* verb = load ? "load" : "store";
  for (int m = 0; m < s[0]; m++) {
    uint32_t at[kLanes] = {};
    uint16_t matrix[8][8];
    if (!load) lanes_to_matrix(warp.reg(data[m]), s[1], matrix);
    for (int row = 0; row < 8; row++) {
      int lane = 8 * m + row;  // whose address it is
      at[row] = shared_address(warp, i, address, lane);
      check_aligned(at[row], 16, lane, load ? "ldmatrix" : "stmatrix");
      check_shared(block, at[row], 16, lane, verb);
      // Every lane takes part in every row.
      Access access = block.by_lane(warp, kSeveralLanes, verb);
      access.lane = lane;
      if (load) block.shadow.read(at[row], 16, access);
      else block.shadow.write(at[row], 16, access, reinterpret_cast<uint8_t*>(matrix[row]), &block.shared[at[row]]);
      if (!load) memcpy(&block.shared[at[row]], matrix[row], 16);
    }
    count_wavefronts(at, 0xff, 16, block.count(i));
    if (load) matrix_to_lanes(block, at, s[1], warp.reg(data[m]));
  }
  warp.clock.unsynchronised |= lanes;
}

// ---- mma.sync. Settings: type of a and b. Operands: d (4), a (4), b (2), c (4).

enum Element { kBf16, kF16, kTf32 };

// d = a b + c for (16, K) and (K, 8). Register r of lane l holds row l / 4 + 8 * (r / 2), column 2 * (l % 4) + r % 2 of
// d. So a lane wants row l / 4 of either half of a, and one column of each parity of b; here by [half][k][row of the
// half] and [parity][k][column / 2].
template <int K>
struct Fragments {
  float a[2][K][8], b[2][K][4];

  void multiply(Warp& warp, const int32_t* o) const {
    float sum[4][kLanes];
    for (int r = 0; r < 4; r++) memcpy(sum[r], warp.reg(o[10 + r]), sizeof sum[r]);
    for (int k = 0; k < K; k++) {
      float rows[2][kLanes], columns[2][kLanes];
      for (int half = 0; half < 2; half++)
        for (int row = 0; row < 8; row++)
          for (int t = 0; t < 4; t++) rows[half][4 * row + t] = a[half][k][row];
      for (int parity = 0; parity < 2; parity++)
        for (int row = 0; row < 8; row++) memcpy(&columns[parity][4 * row], b[parity][k], sizeof b[parity][k]);
      for (int r = 0; r < 4; r++)
        for (int lane = 0; lane < kLanes; lane++) sum[r][lane] += rows[r / 2][lane] * columns[r % 2][lane];
    }
    for (int r = 0; r < 4; r++) memcpy(warp.reg(o[r]), sum[r], sizeof sum[r]);
  }
};

template <float (*kFrom)(uint32_t)>
inline void multiply_halves(Warp& warp, const int32_t* o) {
  Fragments<16> x;
  for (int r = 0; r < 4; r++)
    for (int lane = 0; lane < kLanes; lane++) {
      uint32_t pair = warp.reg(o[4 + r])[lane];
      int k = 2 * (lane % 4) + 8 * (r / 2);
      x.a[r % 2][k][lane / 4] = kFrom(pair & 0xffff), x.a[r % 2][k + 1][lane / 4] = kFrom(pair >> 16);
    }
  for (int r = 0; r < 2; r++)
    for (int lane = 0; lane < kLanes; lane++) {
      uint32_t pair = warp.reg(o[8 + r])[lane];
      int k = 2 * (lane % 4) + 8 * r, column = lane / 4;
      x.b[column % 2][k][column / 2] = kFrom(pair & 0xffff), x.b[column % 2][k + 1][column / 2] = kFrom(pair >> 16);
    }
  x.multiply(warp, o);
}

inline void multiply_tf32(Warp& warp, const int32_t* o) {
  Fragments<8> x;
  for (int r = 0; r < 4; r++)
    for (int lane = 0; lane < kLanes; lane++)
      x.a[r % 2][lane % 4 + 4 * (r / 2)][lane / 4] = from_tf32(warp.reg(o[4 + r])[lane]);
  for (int r = 0; r < 2; r++)
    for (int lane = 0; lane < kLanes; lane++)
      x.b[lane / 4 % 2][lane % 4 + 4 * r][lane / 8] = from_tf32(warp.reg(o[8 + r])[lane]);
  x.multiply(warp, o);
}

inline void do_mma(Block& block, Warp& warp, const Instruction& i, uint32_t lanes) {
  if (!block.whole_warp(warp, i, lanes, "mma.sync")) return;
  const int32_t* o = block.operands(i);
  switch (block.settings(i)[0]) {
    case kBf16: return multiply_halves<from_bf16>(warp, o);
    case kF16: return multiply_halves<from_f16>(warp, o);
    default: return multiply_tf32(warp, o);
  }
}

}  // namespace ptx
