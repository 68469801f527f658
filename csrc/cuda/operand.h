// Descriptors of matrix operands in shared memory, and how the copy engine lays a tile out there.
//
// A tile of rows of D elements lies as D / 64 panels of 64 columns, each (rows, 64): 128 bytes a row, the 16-byte units
// of row r exchanged by XOR with r mod 8 (the 128-byte swizzle, which both the copy engine and the tensor cores apply
// to address bits 4 to 6). Panels start at multiples of 1024 bytes, the period of the swizzle.
#pragma once
#include "primitives.h"

namespace dk {

constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 2 * kPanelColumns;
// Inner dimension of one product.
constexpr int kStep = 16;

// Where a tile starts, in the units of descriptors, 16 bytes.
DK_DEVICE uint32_t operand_start(uint32_t address) { return address >> 4; }

// Describe an operand: groups of 8 rows 1024 bytes apart, swizzle 1 (128 bytes). The distance between panels stays 0:
// no product here spans two.
DK_DEVICE uint64_t descriptor(uint32_t start) {
  constexpr uint64_t kHigh = (uint64_t)1 << 30 | 8 * kRowBytes >> 4;
  return kHigh << 32 | start;
}

// Describe step `k` of a tile whose columns are the inner dimension.
template <int kRows>
DK_DEVICE uint64_t columns_inside(uint32_t start, int k) {
  const int panel = k * kStep / kPanelColumns;
  return descriptor(start + ((panel * kRows * kRowBytes + (k * kStep % kPanelColumns) * 2) >> 4));
}

// Describe step `k` of one panel of a tile whose rows are the inner dimension.
template <int kRows>
DK_DEVICE uint64_t rows_inside(uint32_t start, int panel, int k) {
  return descriptor(start + ((panel * kRows * kRowBytes + k * kStep * kRowBytes) >> 4));
}

}  // namespace dk
