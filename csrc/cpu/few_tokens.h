// The product of a linear layer for few tokens: y = x W' + bias with the GELU that may follow.
//
// A weight is used a few times only, so the way of the weights into the processor takes as long as the products. They
// are read once, where they are, and the next ones are asked for at an even pace while products are made. Both operands
// are read along the summed dimension: no lane is lost, whatever the number of tokens, at the price of a sum over lanes
// for each result. Sums are made in as many parts as there are lanes, in an order that depends on nothing but their
// length.
#pragma once
#include <algorithm>

#include "gelu.h"
#include "pack.h"
#include "parallel.h"

namespace {

DK_INLINE void write_vector(FloatWord, vf x, char* to) { store(reinterpret_cast<float*>(to), x); }
DK_INLINE vf gelu(FloatWord, vf x) { return gelu(x); }
#ifdef DK_HAS_BF16_DOT
DK_INLINE vf gelu(BFloat16Word, vf x) { return gelu_for_bfloat16(x); }
DK_INLINE void write_vector(BFloat16Word, vf x, char* to) { store_bf16(reinterpret_cast<uint16_t*>(to), x); }
#endif

template <class Word>
class FewTokens {
 public:
  explicit FewTokens(const LinearParams& p)
      : p_(p), words_(p.in_features / Word::kPerWord), units_(p.out_features / kUnit),
        blocks_((p.tokens + kMostAtOnce - 1) / kMostAtOnce) {}

  static bool supports(const LinearParams& p) {
    return p.tokens <= kMostTokens && !p.x_transposed && !p.weight_transposed && p.out_features % kUnit == 0 &&
           p.in_features > 0 && p.in_features % (kV * Word::kPerWord) == 0 &&
           bytes_of(p.dtype) * Word::kPerWord == sizeof(float);
  }

  // Returns false when memory ran out.
  bool run() const {
    static thread_local ThreadBlock own;
    float* packed = reinterpret_cast<float*>(own.get(p_.tokens * words_ * (int64_t)sizeof(float)));
    if (!packed) return false;
    for (int64_t b = 0; b < blocks_; b++) pack(first_of(b), first_of(b + 1), packed);
    // Neighbouring outputs to one thread, which knows then what it needs next.
    const int64_t length = p_.threads > 1 ? std::max<int64_t>(1, units_ / (kShares * p_.threads)) : units_;
    const int64_t tasks = (units_ + length - 1) / length;
    const bool done = run_tasks(tasks, p_.threads, scratch_bytes(), [&](int64_t task, char* scratch) {
      const int64_t end = std::min(units_, (task + 1) * length);
      for (int64_t u = task * length; u < end; u++) multiply(u, u + 1 < end, packed, reinterpret_cast<float*>(scratch));
    });
    own.trim();
    return done;
  }

 private:
  static constexpr int kUnit = 16;                                        // outputs side by side
  static constexpr int kRows = 4;                                         // of them in registers
  static constexpr int kMostAtOnce = kMicroRows * kMicroVectors / kRows;  // tokens in registers
  static constexpr int64_t kMostTokens = 3 * kV / 2;  // products of whole panels are faster for more
  static constexpr int64_t kSlice = 768;  // words; those of the tokens in registers stay in the first-level cache
  static constexpr int64_t kShares = 4;   // tasks of a thread, so that none waits long for another

  int64_t scratch_bytes() const { return kUnit * p_.tokens * kV * (int64_t)sizeof(float); }

  // Blocks of tokens of nearly equal size.
  int64_t first_of(int64_t block) const { return block * p_.tokens / blocks_; }

  // Tokens `first` to `end` as [word / kV][token][kV].
  void pack(int64_t first, int64_t end, float* packed) const {
    const float* x = static_cast<const float*>(p_.x);
    float* to = packed + first * words_;
    for (int64_t w = 0; w < words_; w += kV)
      for (int64_t t = first; t < end; t++, to += kV) store(to, load(x + t * words_ + w));
  }

  // All tokens by kUnit outputs; ask for the weights of the next ones where `has_next`.
  void multiply(int64_t unit, bool has_next, const float* packed, float* sums) const {
    const float* weight = static_cast<const float*>(p_.weight) + unit * kUnit * words_;
    for (int64_t from = 0; from < words_; from += kSlice)
      for (int64_t b = 0; b < blocks_; b++) {
        const int64_t first = first_of(b);
        const int tokens = (int)(first_of(b + 1) - first);
        // This block's share of kRows rows.
        const int row = (int)((b * kRows + blocks_ - 1) / blocks_);
        const int rows = has_next ? (int)(((b + 1) * kRows + blocks_ - 1) / blocks_) - row : 0;
        const Step step = {weight + from,
                           packed + first * words_ + from * tokens,
                           std::min(kSlice, words_ - from),
                           sums + first * kUnit * kV,
                           from > 0,
                           kUnit + row};
        if (rows == 0) add<0>(most(), tokens, step);
        else if (rows == 1) add<1>(most(), tokens, step);
        else if (rows == 2) add<2>(most(), tokens, step);
        else add<kRows>(most(), tokens, step);
      }
    for (int64_t t = 0; t < p_.tokens; t++) finish(unit, t, sums + t * kUnit * kV);
  }

  struct Step {
    const float *weight, *x;
    int64_t words;
    float* sums;  // [token][kUnit][kV]
    bool more;    // add to what is there
    int ahead;    // rows from one of the weight to the first that is asked for with it
  };

  template <int kTokens>
  using Tokens = std::integral_constant<int, kTokens>;
  static constexpr Tokens<kMostAtOnce> most() { return {}; }

  template <int kAhead, int kTokens>
  void add(Tokens<kTokens>, int tokens, const Step& step) const {
    if constexpr (kTokens > 1)
      if (tokens < kTokens) return add<kAhead>(Tokens<kTokens - 1>(), tokens, step);
    for (int r = 0; r < kUnit; r += kRows) add_rows<kAhead, kTokens>(step, r);
  }

  // The sums of kRows outputs, from `first` on, and of kTokens tokens. kAhead: rows asked for.
  template <int kAhead, int kTokens>
  DK_NOINLINE void add_rows(const Step& step, int first) const {
    const float *weight = step.weight + first * words_, *x = step.x;
    const float* next = weight + step.ahead * words_;
    Sum sum[kTokens][kRows];
    DK_UNROLL
    for (int t = 0; t < kTokens; t++) {
      DK_UNROLL
      for (int r = 0; r < kRows; r++) sum[t][r] = zero_sum();
    }
    for (int64_t w = 0; w < step.words; w += kV, x += kTokens * kV) {
      vf row[kRows];
      DK_UNROLL
      for (int r = 0; r < kRows; r++) {
        row[r] = load(weight + r * words_ + w);
        if (r < kAhead) __builtin_prefetch(next + r * words_ + w, 0, 2);
      }
      DK_UNROLL
      for (int t = 0; t < kTokens; t++) {
        const vf token = load(x + t * kV);
        DK_UNROLL
        for (int r = 0; r < kRows; r++) sum[t][r] = Word::multiply_add(row[r], token, sum[t][r]);
      }
    }
    DK_UNROLL
    for (int t = 0; t < kTokens; t++) {
      DK_UNROLL
      for (int r = 0; r < kRows; r++) {
        float* to = step.sums + (t * kUnit + first + r) * kV;
        store(to, step.more ? load(to) + rounded(sum[t][r]) : rounded(sum[t][r]));
      }
    }
  }

  // Add up the lanes of a token's sums, and the bias, and write them.
  void finish(int64_t unit, int64_t token, const float* sums) const {
    const int64_t size = bytes_of(p_.dtype), first = unit * kUnit;
    float bias[kUnit] = {};
    if (p_.bias) read_floats(static_cast<const char*>(p_.bias) + first * size, p_.dtype, kUnit, bias);
    char* out = static_cast<char*>(p_.out) + (token * p_.out_features + first) * size;
    for (int i = 0; i < kUnit; i += kV) {
      vf part[kV];
      DK_UNROLL
      for (int c = 0; c < kV; c++) part[c] = load(sums + (i + c) * kV);
      vf y = lane_sums(part) + load(bias + i);
      if (p_.gelu) y = gelu(Word(), y);
      write_vector(Word(), y, out + i * size);
    }
  }

  const LinearParams& p_;
  const int64_t words_, units_, blocks_;  // words of a row; units of outputs; blocks of tokens
};

}  // namespace
