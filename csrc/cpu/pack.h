// Copies of tensor rows in the two layouts that gemm.h reads, converted to the words the products are made of.
#pragma once
#include "gemm.h"
#include "panels.h"

namespace {

// Words that hold head_dim elements, and that number rounded up to whole vectors.
template <class Word>
DK_INLINE int words_of(int head_dim) {
  return (head_dim + Word::kPerWord - 1) / Word::kPerWord;
}
template <class Word>
DK_INLINE int padded_words(int head_dim) {
  return (int)round_to_vector(words_of<Word>(head_dim));
}

// Row i as words, zero-filled to padded_words.
DK_INLINE void read_words(FloatWord, const Rows& rows, int64_t i, int head_dim, float* to) {
  read_row(rows, i, head_dim, padded_words<FloatWord>(head_dim), to);
}
#ifdef DK_HAS_BF16_DOT
DK_INLINE void read_words(BFloat16Word, const Rows& rows, int64_t i, int head_dim, float* to) {
  const char* from = rows.row(i);
  const int words = head_dim / 2;
  int w = 0;
  for (; w + kV <= words; w += kV) store(to + w, load(reinterpret_cast<const float*>(from) + w));
  std::memcpy(to + w, from + w * sizeof(float), (size_t)head_dim * 2 - w * sizeof(float));
  std::memset(reinterpret_cast<char*>(to) + head_dim * 2, 0,
              (size_t)padded_words<BFloat16Word>(head_dim) * sizeof(float) - head_dim * 2);
}
#endif

// Rows first ... first + kV - 1 (those with a bit in `present`; others are zero) as one column panel [word][kV]:
// lane c of vector w is word w of row first + c. kScaled: times `factor`.
template <class Word, bool kScaled = false>
static void pack_panel(const Rows& rows, int64_t first, LaneBits present, int head_dim, float* panel,
                       float factor = 1.0f) {
  const int padded = padded_words<Word>(head_dim), words = words_of<Word>(head_dim);
  const bool in_place = bytes_of(rows.type) * Word::kPerWord == sizeof(float) && head_dim % (kV * Word::kPerWord) == 0;
  float copy[kV * kMaxHeadDim];
  const float* source[kV];
  for (int c = 0; c < kV; c++) {
    if (in_place) prefetch_row<0>(rows, first + kV + c, head_dim);
    float* to = copy + c * kMaxHeadDim;
    source[c] = to;
    if (!(present >> c & 1)) std::memset(to, 0, (size_t)padded * sizeof(float));
    else if (in_place) source[c] = reinterpret_cast<const float*>(rows.row(first + c));
    else read_words(Word(), rows, first + c, head_dim, to);
  }
  for (int w = 0; w < words; w += kV) {
    vf block[kV];
    DK_UNROLL
    for (int c = 0; c < kV; c++) block[c] = load(source[c] + w);
    transpose(block);
    const int count = words - w < kV ? words - w : kV;
    for (int i = 0; i < count; i++)
      store(panel + (w + i) * kV, kScaled ? Word::scaled(block[i], set1(factor)) : block[i]);
  }
}

// Rows of a head as words along the tokens, [row / kPerWord][padded head_dim], which a product over tokens reads.

// Rows i and j, or zeros where they are not `present`.
DK_INLINE void pack_two(FloatWord, const Rows& rows, int64_t i, int64_t j, int head_dim, int padded, float* to,
                        LaneBits present = 3) {
  for (int c = 0; c < 2; c++) {
    if (present >> c & 1) read_row(rows, c ? j : i, head_dim, padded, to + c * padded);
    else std::memset(to + c * padded, 0, (size_t)padded * sizeof(float));
  }
}
#ifdef DK_HAS_BF16_DOT
DK_INLINE void pack_two(BFloat16Word, const Rows& rows, int64_t i, int64_t j, int head_dim, int padded, float* to,
                        LaneBits present = 3) {
  static const uint16_t kZeros[kMaxHeadDim] = {};
  const uint16_t* even = present & 1 ? reinterpret_cast<const uint16_t*>(rows.row(i)) : kZeros;
  const uint16_t* odd = present & 2 ? reinterpret_cast<const uint16_t*>(rows.row(j)) : kZeros;
  uint32_t* pair = reinterpret_cast<uint32_t*>(to);
  int d = 0;
  for (; d + kV <= head_dim; d += kV) interleave_bf16(even + d, odd + d, pair + d);
  for (; d < head_dim; d++) pair[d] = even[d] | (uint32_t)odd[d] << 16;
  for (; d < padded; d++) pair[d] = 0;
}
#endif

// kV rows; absent ones are zero.
template <class Word>
DK_INLINE void pack_values(Word word, const Rows& rows, int64_t first, LaneBits present, int head_dim, int padded,
                           float* to) {
  for (int c = 0; c < kV; c += 2)
    pack_two(word, rows, first + c, first + c + 1, head_dim, padded, to + c / Word::kPerWord * padded,
             present >> c & 3);
}

}  // namespace
