// The products of a linear layer: y = x W' + bias with the GELU that may follow, and those of its gradients.
//
// The tokens are laid out, a block of them at a time, as the columns of the product. The weight is read where it is,
// a row of it is a row of the product: a general library lays it out anew in every call, which few tokens do not pay
// for. Sums are made in parts, so that the error does not grow with their length as that of a single sum would; their
// order depends on nothing but their length.
#pragma once
#include <algorithm>

#include "few_tokens.h"
#include "pack.h"
#include "parallel.h"

namespace {

template <class Word>
class Linear {
 public:
  explicit Linear(const LinearParams& p)
      : p_(p), slices_((p.in_features + kSlice - 1) / kSlice), panels_((p.tokens + kV - 1) / kV) {
    // Blocks of equal size, but whole steps of the product.
    const int64_t blocks = (panels_ + kMostPanels - 1) / kMostPanels;
    const int64_t steps = (panels_ + kMicroVectors * blocks - 1) / (kMicroVectors * blocks);
    block_ = std::min(panels_, steps * kMicroVectors);
    row_ = (block_ + 1) * kV;
    // Fewer outputs where many threads want a share.
    width_ = p.out_features >= 2 * kOutputs * p.threads ? kOutputs : kUnit;
  }

  static bool supports(const LinearParams& p) {
    const bool straight = !p.x_transposed && !p.weight_transposed;
    return bytes_of(p.dtype) * Word::kPerWord == sizeof(float) && p.in_features > 0 &&
           p.in_features % Word::kPerWord == 0 && p.out_features % kUnit == 0 && (straight || Word::kPerWord == 1);
  }

  // Returns false when memory ran out.
  bool run() const {
    static thread_local ThreadBlock own;
    const int64_t tasks = (p_.out_features + width_ - 1) / width_, block_floats = slices_ * block_ * kPanel;
    // As many blocks at once as keep all threads busy.
    const int64_t wanted = (16 * p_.threads + tasks - 1) / tasks;
    const int64_t room = std::max<int64_t>(1, kPackedFloats / block_floats);
    const int64_t group = std::min(panels_, block_ * std::min(wanted, room));
    float* packed = reinterpret_cast<float*>(own.get(slices_ * group * kPanel * (int64_t)sizeof(float)));
    bool done = packed;
    for (int64_t first = 0; done && first < panels_; first += group) {
      const int64_t count = std::min(group, panels_ - first), blocks = (count + block_ - 1) / block_;
      const auto panels = [&](int64_t b) { return std::min(block_, count - b * block_); };
      done = run_tasks(count, p_.threads, 64, [&](int64_t t, char*) {
        const int64_t b = t / block_;
        pack(first + t, packed + b * block_floats, t - b * block_, panels(b));
      });
      done = done && run_tasks(blocks * tasks, p_.threads, scratch_bytes(), [&](int64_t task, char* scratch) {
               const int64_t b = task / tasks;
               multiply(task % tasks * width_, first + b * block_, panels(b), packed + b * block_floats,
                        reinterpret_cast<float*>(scratch));
             });
    }
    own.trim();
    return done;
  }

 private:
  static constexpr int kOutputs = 32, kUnit = 16;  // outputs of a task at most, and their unit
  // Words of a slice, summed in registers, and elements. A slice of kOutputs rows of the weight and of kMicroVectors
  // panels stays in the first-level cache.
  static constexpr int64_t kWords = 128, kSlice = kWords * Word::kPerWord;
  static constexpr int64_t kPanel = kWords * kV;    // floats of a panel of tokens in one slice
  static constexpr int64_t kMostPanels = 192 / kV;  // of a block: its slice stays in the second-level cache
  static constexpr int64_t kFewPanels =
      96 / kV;  // whose products are done before the processor has fetched more weights
  static constexpr int64_t kPackedFloats = 1 << 21;  // of all blocks at once
  static constexpr int64_t kLargeBytes = 1 << 20;    // of results

  int elements(int64_t slice) const { return (int)std::min<int64_t>(kSlice, p_.in_features - slice * kSlice); }
  int64_t scratch_bytes() const {
    return (kOutputs * row_ + (p_.weight_transposed ? kOutputs * kWords : 0)) * (int64_t)sizeof(float);
  }

  // Columns `first` and on of a (rows, width) matrix.
  Rows rows(const void* data, int64_t width, int64_t first) const {
    const int64_t size = bytes_of(p_.dtype);
    return {static_cast<char*>(const_cast<void*>(data)) + first * size, width * size, p_.dtype};
  }

  // Panel t of all tokens as panel `own` of a block of `panels`, laid out as [slice][panel][word][kV].
  void pack(int64_t t, float* block, int64_t own, int64_t panels) const {
    const int count = (int)std::min<int64_t>(kV, p_.tokens - t * kV);
    for (int64_t s = 0; s < slices_; s++) {
      float* panel = block + (s * panels + own) * kPanel;
      if (p_.x_transposed) {
        const Rows columns = rows(p_.x, p_.tokens, t * kV);
        for (int w = 0; w < elements(s); w++) read_row(columns, s * kSlice + w, count, kV, panel + w * kV);
      } else {
        pack_panel<Word>(rows(p_.x, p_.in_features, s * kSlice), t * kV, first_lanes(count), elements(s), panel);
      }
    }
  }

  void multiply(int64_t output, int64_t panel, int64_t panels, const float* packed, float* sums) const {
    const int count = (int)std::min(width_, p_.out_features - output);
    for (int64_t s = 0; s < slices_; s++) {
      const ColumnSource tokens{packed + s * panels * kPanel, kPanel, kV};
      if (s == slices_ - 1) ask_for_results(output, count, panel, panels);
      const RowSource weight = weight_rows(output, count, s, sums + kOutputs * row_);
      const int words = words_of<Word>(elements(s));
      if (weight.ahead) gemm<Word, true>(count, (int)panels, words, weight, tokens, sums, row_, s > 0);
      else gemm<Word>(count, (int)panels, words, weight, tokens, sums, row_, s > 0);
    }
    for (int64_t t = 0; t < panels; t++) finish(output, count, panel + t, sums + t * kV);
  }

  // `count` rows of the weight; copied first where they lie across.
  RowSource weight_rows(int64_t output, int count, int64_t slice, float* copy) const {
    if (!p_.weight_transposed) {
      const Rows weight = rows(p_.weight, p_.in_features, slice * kSlice);
      const ptrdiff_t row = weight.stride / (ptrdiff_t)sizeof(float);
      // The next step's weights, this thread's: products of pairs, and of few tokens, are done before the processor has
      // fetched them by itself.
      const bool asks = Word::kPerWord > 1 || panels_ <= kFewPanels;
      const ptrdiff_t ahead = slice + 1 < slices_ ? kWords : p_.threads * width_ * row - slice * kWords;
      return {reinterpret_cast<const float*>(weight.row(output)), row, 1, asks ? ahead : 0};
    }
    ask_for_next(output, slice);
    const Rows columns = rows(p_.weight, p_.out_features, output);
    for (int w = 0; w < elements(slice); w++) read_row(columns, slice * kSlice + w, count, count, copy + w * kOutputs);
    return {copy, 1, kOutputs};
  }

  // Ask for the transposed weights of the next step. Inlined, or gcc drops the call of what has no effect that it knows
  // of.
  DK_INLINE_MEMBER void ask_for_next(int64_t output, int64_t slice) const {
    if (++slice == slices_) slice = 0, output += width_;
    const int count = (int)std::min(width_, p_.out_features - output);
    const Rows columns = rows(p_.weight, p_.out_features, output);
    for (int w = 0; w < elements(slice); w++) prefetch_row<1>(columns, slice * kSlice + w, count);
  }

  // Ask for the memory of the results while the last slice is summed: a line or two of each row, which no processor
  // fetches ahead by itself. Small results are still in the cache, from the last that lay there.
  DK_INLINE_MEMBER void ask_for_results(int64_t output, int count, int64_t panel, int64_t panels) const {
    if (p_.tokens * p_.out_features * bytes_of(p_.dtype) < kLargeBytes) return;
    const Rows out = rows(p_.out, p_.out_features, output);
    const int64_t end = std::min(p_.tokens, (panel + panels) * kV);
    for (int64_t t = panel * kV; t < end; t++) prefetch_row<1>(out, t, count);
  }

  // Turn the sums of one panel, add the bias, and write a row for each token.
  void finish(int64_t output, int count, int64_t t, const float* sums) const {
    float bias[kOutputs] = {};
    if (p_.bias) read_row(rows(p_.bias, 0, output), 0, count, count, bias);
    for (int i = 0; i < count; i += kV) {
      vf y[kV];
      DK_UNROLL
      for (int c = 0; c < kV; c++) y[c] = load(sums + (i + c) * row_);
      transpose(y);
      for (int c = 0; c < kV; c++) y[c] = y[c] + load(bias + i);
      if (p_.gelu)
        for (int c = 0; c < kV; c++) y[c] = gelu(Word(), y[c]);
      const Rows out = rows(p_.out, p_.out_features, output + i);
      const int64_t tokens = std::min<int64_t>(kV, p_.tokens - t * kV);
      for (int64_t c = 0; c < tokens; c++) write_vector(Word(), y[c], out.row(t * kV + c));
    }
  }

  const LinearParams& p_;
  const int64_t slices_, panels_;  // panels of all tokens
  int64_t block_;                  // panels of a block, but for the last one
  int64_t width_;                  // outputs of a task, but for the last one
  int64_t row_;  // length of a row of sums; a vector more than needed, or rows of 128 tokens would share places in the
                 // cache
};

}  // namespace
