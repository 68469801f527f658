// The linear layer of a short text: y = x W' + bias for few tokens, with the GELU that may follow.
//
// A general library lays out the weight anew in every call, and few tokens do not pay for that. Here the tokens are
// laid out, as the columns of the product, and the weight is read where it is: a row of it is a row of the product.
#pragma once
#include <algorithm>

#include "gelu.h"
#include "pack.h"
#include "parallel.h"

namespace {

DK_INLINE void write_vector(FloatWord, vf x, char* to) { store(reinterpret_cast<float*>(to), x); }
#ifdef DK_HAS_BF16_DOT
DK_INLINE void write_vector(BFloat16Word, vf x, char* to) { store_bf16(reinterpret_cast<uint16_t*>(to), x); }
#endif

template <class Word>
class Linear {
 public:
  explicit Linear(const LinearParams& p)
      : p_(p), words_(Word::kPerWord == 1 && p.in_features <= 512 ? 128 : 256), slice_(words_ * Word::kPerWord),
        panel_(words_ * kV), panels_((p.tokens + kV - 1) / kV), slices_((p.in_features + slice_ - 1) / slice_),
        row_((panels_ + 1) * kV) {}

  static bool supports(const LinearParams& p) {
    return bytes_of(p.dtype) * Word::kPerWord == sizeof(float) && p.in_features > 0 &&
           p.in_features % Word::kPerWord == 0 && p.out_features % kOutputs == 0;
  }

  // Returns false when memory ran out.
  bool run() const {
    static thread_local ThreadBlock own;
    float* packed = reinterpret_cast<float*>(own.get(slices_ * panels_ * panel_ * (int64_t)sizeof(float)));
    bool done = packed && run_tasks(panels_, p_.threads, 64, [&](int64_t t, char*) { pack(t, packed); });
    done = done && run_tasks(p_.out_features / kOutputs, p_.threads, kOutputs * row_ * (int64_t)sizeof(float),
                             [&](int64_t task, char* block) {
                               multiply(task * kOutputs, packed, reinterpret_cast<float*>(block));
                             });
    own.trim();
    return done;
  }

 private:
  static constexpr int kOutputs = 16;  // of a task

  int elements(int64_t slice) const { return (int)std::min<int64_t>(slice_, p_.in_features - slice * slice_); }

  // Columns `first` and on of a (rows, width) matrix.
  Rows rows(const void* data, int64_t width, int64_t first) const {
    const int64_t size = bytes_of(p_.dtype);
    return {static_cast<char*>(const_cast<void*>(data)) + first * size, width * size, p_.dtype};
  }

  // One panel of tokens, as [slice][panel][word][kV].
  void pack(int64_t t, float* packed) const {
    const LaneBits present = first_lanes((int)std::min<int64_t>(kV, p_.tokens - t * kV));
    for (int64_t s = 0; s < slices_; s++)
      pack_panel<Word>(rows(p_.x, p_.in_features, s * slice_), t * kV, present, elements(s),
                       packed + (s * panels_ + t) * panel_);
  }

  void multiply(int64_t output, const float* packed, float* sums) const {
    for (int64_t s = 0; s < slices_; s++) {
      const Rows weight = rows(p_.weight, p_.in_features, s * slice_);
      if (Word::kPerWord > 1) ask_for_next(output, s);
      const RowSource outputs{reinterpret_cast<const float*>(weight.row(output)), weight.stride / 4, 1};
      const ColumnSource tokens{packed + s * panels_ * panel_, panel_, kV};
      gemm<Word>(kOutputs, (int)panels_, words_of<Word>(elements(s)), outputs, tokens, sums, row_, s > 0);
    }
    for (int64_t t = 0; t < panels_; t++) finish(output, t, sums + t * kV);
  }

  // Ask for the weights of the next step: products of pairs are done before the processor has fetched them by itself.
  // (Those of floats are not, and lose by it.) Inlined, or gcc drops the call of what has no effect that it knows of.
  DK_INLINE_MEMBER void ask_for_next(int64_t output, int64_t slice) const {
    if (++slice == slices_) slice = 0, output += kOutputs;
    if (output == p_.out_features) return;
    const Rows weight = rows(p_.weight, p_.in_features, slice * slice_);
    for (int i = 0; i < kOutputs; i++) prefetch_row<1>(weight, output + i, elements(slice));
  }

  // Turn the sums of one panel, add the bias, and write a row for each token.
  void finish(int64_t output, int64_t t, const float* sums) const {
    float bias[kOutputs] = {};
    if (p_.bias) read_row(rows(p_.bias, 0, output), 0, kOutputs, kOutputs, bias);
    for (int i = 0; i < kOutputs; i += kV) {
      vf y[kV];
      DK_UNROLL
      for (int c = 0; c < kV; c++) y[c] = load(sums + (i + c) * row_);
      transpose(y);
      for (int c = 0; c < kV; c++) y[c] = y[c] + load(bias + i);
      if (p_.gelu)
        for (int c = 0; c < kV; c++) y[c] = gelu(y[c]);
      const Rows out = rows(p_.out, p_.out_features, output + i);
      const int64_t count = std::min<int64_t>(kV, p_.tokens - t * kV);
      for (int64_t c = 0; c < count; c++) write_vector(Word(), y[c], out.row(t * kV + c));
    }
  }

  const LinearParams& p_;
  // So many words are summed in registers, in several slices: a single sum over all of them would lose digits.
  const int64_t words_, slice_;
  const int64_t panel_;  // floats of a panel of tokens in one slice
  const int64_t panels_, slices_;
  const int64_t row_;  // length of a row of sums; a vector more than needed, or rows of 128 tokens would share places
                       // in the cache
};

}  // namespace
