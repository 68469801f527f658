// Weights as the A operand of two products: weights . x, which sums over their columns, and weights^T . x, which sums
// over their rows. Weights are probabilities, score gradients and band sums, computed as floats. Float products read
// them in place both ways. A bfloat16 word pairs neighbours along the summed dimension, so there they are rounded into
// one copy for each way.
#pragma once
#include "gemm.h"

namespace {

template <class Word>
struct Weights;

template <>
struct Weights<FloatWord> {
  static constexpr int64_t floats(int64_t, int64_t) { return 0; }
  const float* values;
  ptrdiff_t stride;

  Weights(const float* values, ptrdiff_t stride, float*, float*, ptrdiff_t) : values(values), stride(stride) {}
  void round(int, int, int, int) const {}
  RowSource over_columns(ptrdiff_t row, ptrdiff_t column) const { return {values + row * stride + column, stride, 1}; }
  RowSource over_rows(ptrdiff_t row, ptrdiff_t column) const { return {values + row * stride + column, 1, stride}; }
};

#ifdef DK_HAS_BF16_DOT
template <>
struct Weights<BFloat16Word> {
  // Room for one copy.
  static constexpr int64_t floats(int64_t rows, int64_t columns) { return rows * columns / 2; }
  const float* values;
  ptrdiff_t stride;
  float* along;   // [row][column / 2], or null where no product sums over columns
  float* across;  // [row / 2][column]
  ptrdiff_t columns;

  Weights(const float* values, ptrdiff_t stride, float* along, float* across, ptrdiff_t columns)
      : values(values), stride(stride), along(along), across(across), columns(columns) {}

  // Round `count` rows and `width` columns; up to a vector of columns more may be written.
  void round(int row, int count, int column, int width) const {
    for (int r = row; r < row + count; r += 2)
      for (int c = column; c < column + width; c += kV) {
        const vf even = load(values + r * stride + c), odd = load(values + (r + 1) * stride + c);
        store_bf16_pairs(across + r / 2 * columns + c, even, odd);
        if (!along) continue;
        store_bf16(reinterpret_cast<uint16_t*>(along) + r * columns + c, even);
        store_bf16(reinterpret_cast<uint16_t*>(along) + (r + 1) * columns + c, odd);
      }
  }
  RowSource over_columns(ptrdiff_t row, ptrdiff_t column) const {
    return {along + (row * columns + column) / 2, columns / 2, 1};
  }
  RowSource over_rows(ptrdiff_t row, ptrdiff_t column) const {
    return {across + row / 2 * columns + column, 1, columns};
  }
};
#endif

}  // namespace
