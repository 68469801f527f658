// Small matrix products C (+)= A * B on packed operands, all in cache: the only GEMM loop but that of few_tokens.h.
//
// A "word" is one float, or one pair of bfloat16 neighbours along the summed dimension (float32 accumulation). B is
// read a vector of kV columns at a time; its vectors lie `panel` floats apart for the next kV columns and `step`
// floats apart for the next word of the summed dimension, which describes both column panels [columns/kV][K][kV]
// (panel = K * kV, step = kV) and plain rows [K][columns] (panel = kV, step = row length).
#pragma once
#include <algorithm>
#include <cstddef>
#include <utility>

#include "simd.h"

namespace {

// `scaled`: every number of these words times a power of two.
struct FloatWord {
  static constexpr int kPerWord = 1;
  DK_INLINE Sum multiply_add(const float* a, vf b, Sum c) { return sum_product(set1(*a), b, c); }
  DK_INLINE Sum multiply_add(vf a, vf b, Sum c) { return sum_product(a, b, c); }
#ifdef DK_HAS_LANE_PRODUCTS
  template <int kLane>
  DK_INLINE Sum multiply_add_lane(quad a, vf b, Sum c) {
    return fma_lane<kLane>(a, b, c);
  }
#endif
  DK_INLINE vf scaled(vf words, vf factor) { return words * factor; }
};

#ifdef DK_HAS_BF16_DOT
struct BFloat16Word {
  static constexpr int kPerWord = 2;
  DK_INLINE Sum multiply_add(const float* a, vf b, Sum c) {
    uint32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return dot_bf16_pairs(pair, b, c);
  }
  DK_INLINE Sum multiply_add(vf a, vf b, Sum c) { return dot_bf16_pairs(a, b, c); }
#ifdef DK_HAS_LANE_PRODUCTS
  template <int kLane>
  DK_INLINE Sum multiply_add_lane(quad a, vf b, Sum c) {
    return dot_bf16_lane<kLane>(a, b, c);
  }
#endif
  DK_INLINE vf scaled(vf words, vf factor) { return scale_bf16_pairs(words, factor); }
};
#endif

struct ColumnSource {  // the B operand
  const float* data;
  ptrdiff_t panel, step;
};

struct RowSource {  // the A operand, in words
  const float* data;
  ptrdiff_t row, step;
  ptrdiff_t ahead = 0;  // words from a row to the one that kAhead asks for on the way

  RowSource from(int r) const { return {data + r * row, row, step, ahead}; }
};

constexpr int kLineWords = 64 / sizeof(float);

// Ask for the line that comes `ahead` of each row's, once a line.
template <int kRows>
DK_INLINE void ask_ahead(RowSource a, int w) {
  if (w % kLineWords) return;
  DK_UNROLL
  for (int r = 0; r < kRows; r++) __builtin_prefetch(a.data + r * a.row + w + a.ahead, 0, 2);
}

#ifdef DK_HAS_LANE_PRODUCTS
// sum += A * B for the words w + kLane of four that `a` holds for each row.
template <class Word, int kLane, int kRows, int kVectors>
DK_INLINE void add_lane(const quad (&a)[kRows], const float* b, ptrdiff_t panel, Sum (&sum)[kRows][kVectors]) {
  DK_UNROLL
  for (int n = 0; n < kVectors; n++) {
    const vf column = load(b + n * panel);
    DK_UNROLL
    for (int r = 0; r < kRows; r++) sum[r][n] = Word::template multiply_add_lane<kLane>(a[r], column, sum[r][n]);
  }
}
// sum += A * B for one word, which `a` holds for four rows a register.
template <class Word, int kRows, int kVectors, int... kRow>
DK_INLINE void add_word(const quad (&a)[kRows / 4], const float* b, ptrdiff_t panel, Sum (&sum)[kRows][kVectors],
                        std::integer_sequence<int, kRow...>) {
  DK_UNROLL
  for (int n = 0; n < kVectors; n++) {
    const vf column = load(b + n * panel);
    ((sum[kRow][n] = Word::template multiply_add_lane<kRow % 4>(a[kRow / 4], column, sum[kRow][n])), ...);
  }
}
// The words of A read four at a time, along rows or across them; return how many were.
template <class Word, int kRows, int kVectors, bool kAhead>
DK_INLINE int multiply_lanes(RowSource a, ColumnSource b, int words, Sum (&sum)[kRows][kVectors]) {
  int w = 0;
  if (a.step == 1) {
    for (; w + 4 <= words; w += 4) {
      if (kAhead) ask_ahead<kRows>(a, w);
      quad row[kRows];
      DK_UNROLL
      for (int r = 0; r < kRows; r++) row[r] = vld1q_f32(a.data + r * a.row + w);
      const float* column = b.data + w * b.step;
      add_lane<Word, 0>(row, column, b.panel, sum);
      add_lane<Word, 1>(row, column + b.step, b.panel, sum);
      add_lane<Word, 2>(row, column + 2 * b.step, b.panel, sum);
      add_lane<Word, 3>(row, column + 3 * b.step, b.panel, sum);
    }
  } else if (a.row == 1) {
    if constexpr (kRows % 4 == 0) {
      for (; w < words; w++) {
        quad rows[kRows / 4];
        DK_UNROLL
        for (int r = 0; r < kRows / 4; r++) rows[r] = vld1q_f32(a.data + w * a.step + 4 * r);
        add_word<Word>(rows, b.data + w * b.step, b.panel, sum, std::make_integer_sequence<int, kRows>());
      }
    }
  }
  return w;
}
#endif

// sum[kRows][kVectors] = A * B, in registers. kAhead: memory that is needed soon is asked for at an even pace, rows of A
// being read from end to end.
template <class Word, int kRows, int kVectors, bool kAhead = false>
DK_INLINE void multiply(RowSource a, ColumnSource b, int words, Sum (&sum)[kRows][kVectors]) {
  DK_UNROLL
  for (int r = 0; r < kRows; r++) {
    DK_UNROLL
    for (int n = 0; n < kVectors; n++) sum[r][n] = zero_sum();
  }
  int w = 0;
#ifdef DK_HAS_LANE_PRODUCTS
  w = multiply_lanes<Word, kRows, kVectors, kAhead>(a, b, words, sum);
#endif
  for (; w < words; w++) {
    if (kAhead) ask_ahead<kRows>(a, w);
    vf column[kVectors];
    DK_UNROLL
    for (int n = 0; n < kVectors; n++) column[n] = load(b.data + w * b.step + n * b.panel);
    DK_UNROLL
    for (int r = 0; r < kRows; r++) {
      DK_UNROLL
      for (int n = 0; n < kVectors; n++)
        sum[r][n] = Word::multiply_add(a.data + r * a.row + w * a.step, column[n], sum[r][n]);
    }
  }
}

template <class Word, int kRows, int kVectors, bool kAhead = false>
DK_INLINE void micro_kernel(RowSource a, ColumnSource b, float* c, ptrdiff_t ldc, int words, bool accumulate) {
  Sum sum[kRows][kVectors];
  multiply<Word, kRows, kVectors, kAhead>(a, b, words, sum);
  // C is read only now: its way from the L2 cache then overlaps with the products.
  if (accumulate) {
    DK_UNROLL
    for (int r = 0; r < kRows; r++) {
      DK_UNROLL
      for (int n = 0; n < kVectors; n++) store(c + r * ldc + n * kV, load(c + r * ldc + n * kV) + rounded(sum[r][n]));
    }
    return;
  }
  DK_UNROLL
  for (int r = 0; r < kRows; r++) {
    DK_UNROLL
    for (int n = 0; n < kVectors; n++) store(c + r * ldc + n * kV, rounded(sum[r][n]));
  }
}

// All rows of A against kVectors vectors of B. Row counts are multiples of kMicroRows except for single rows.
template <class Word, int kVectors, bool kAhead = false>
DK_NOINLINE static void gemm_rows(int rows, RowSource a, ColumnSource b, float* c, ptrdiff_t ldc, int words,
                                  bool accumulate) {
  constexpr int kRows = kVectors > kMicroVectors ? kMicroRows / 2 : kMicroRows;
  int r = 0;
  // More rows, or there would be too few independent sums; but not if all of them, 4 KiB or a
  // multiple apart, compete for the same places in the cache.
  if (kVectors == 1 && a.row % 1024 != 0)
    for (; r + 2 * kMicroRows <= rows; r += 2 * kMicroRows)
      micro_kernel<Word, 2 * kMicroRows, kVectors, kAhead>(a.from(r), b, c + r * ldc, ldc, words, accumulate);
  for (; r + kRows <= rows; r += kRows)
    micro_kernel<Word, kRows, kVectors, kAhead>(a.from(r), b, c + r * ldc, ldc, words, accumulate);
  for (; r < rows; r++) micro_kernel<Word, 1, kVectors, kAhead>(a.from(r), b, c + r * ldc, ldc, words, accumulate);
}

template <class Word, bool kAhead>
DK_INLINE void gemm_vectors(int take, int rows, RowSource a, ColumnSource b, float* c, ptrdiff_t ldc, int words,
                            bool accumulate) {
  if (kMicroRows >= 8 && take == 4) gemm_rows<Word, 4, kAhead>(rows, a, b, c, ldc, words, accumulate);
  else if (take == 3) gemm_rows<Word, 3, kAhead>(rows, a, b, c, ldc, words, accumulate);
  else if (take == 2) gemm_rows<Word, 2, kAhead>(rows, a, b, c, ldc, words, accumulate);
  else gemm_rows<Word, 1, kAhead>(rows, a, b, c, ldc, words, accumulate);
}

// How many of the column vectors that are left the next step takes.
DK_INLINE int next_vectors(int left) {
  // 3 + 1 leaves a thin last step; 2 + 2 keeps enough independent sums in flight.
  return left == 4 || left == 2 ? 2 : (left < kMicroVectors ? left : kMicroVectors);
}

// C[rows][vectors * kV] (+)= A[rows][words] * B[words][vectors * kV]. kAhead: as in `multiply`, each row once.
template <class Word, bool kAhead = false>
DK_NOINLINE static void gemm(int rows, int vectors, int words, RowSource a, ColumnSource b, float* c, ptrdiff_t ldc,
                             bool accumulate) {
  int n = 0;
  while (n < vectors) {
    // With registers for it 4 at once read plain rows of 4 vectors, the common head size, from end to end.
    const int left = vectors - n, take = kMicroRows >= 8 && left == 4 ? 4 : next_vectors(left);
    const ColumnSource columns{b.data + n * b.panel, b.panel, b.step};
    float* to = c + n * kV;
    if (kAhead && n == 0) gemm_vectors<Word, true>(take, rows, a, columns, to, ldc, words, accumulate);
    else gemm_vectors<Word, false>(take, rows, a, columns, to, ldc, words, accumulate);
    n += take;
  }
}

}  // namespace
