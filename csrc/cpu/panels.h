// One sample cut into panels of kV tokens. Panels are the unit of everything below: a panel with nothing allowed in it
// is left out, so padding on either side, holes and prefix keys need no code of their own further down.
#pragma once
#include <algorithm>

#include "element.h"

namespace {

struct KeyPanel {
  int64_t key;        // first key token
  int64_t position;   // its position; only differences to query tokens matter
  int count;          // keys in the panel, 1 ... kV
  LaneBits allowed;   // keys that the key mask leaves
  bool has_position;  // false for prefix keys
};

struct RowPanel {
  int64_t row;      // first query token
  int count;        // queries in the panel, 1 ... kV
  LaneBits active;  // queries that the query mask leaves
};

// One sample: where its tensors start and how long it is.
struct Sample {
  int64_t index;        // for strides and the dropout stream
  int64_t first_token;  // offset along the token dimension; not 0 only for packed sequences
  int64_t nq, nk;
};

DK_INLINE Sample sample_of(const AttentionParams& p, int64_t b) {
  if (!p.cu_seqlens) return {b, 0, p.nq, p.nk};
  const int64_t start = p.cu_seqlens[b], length = p.cu_seqlens[b + 1] - start;
  return {b, start, length, length};
}

// The tokens of one head of one sample.
DK_INLINE Rows head_of(const AttentionParams& p, const Tensor4& t, const Sample& s, int64_t h, int64_t type) {
  const int64_t b = p.cu_seqlens ? 0 : s.index, size = bytes_of(type);
  const int64_t first = b * t.stride_b + h * t.stride_h + s.first_token * t.stride_n;
  return {static_cast<char*>(t.data) + first * size, t.stride_n * size, type};
}
template <class T>
DK_INLINE T* statistics_of(const AttentionParams& p, T* data, const Sample& s, int64_t h) {
  const int64_t b = p.cu_seqlens ? 0 : s.index;
  return data ? data + b * p.lse_stride_b + h * p.lse_stride_h + s.first_token : nullptr;
}

// Asks for rows that will be needed next, a few with every tile of the present head, while memory is idle.
class NextHead {
 public:
  // Forget what was asked for and spread what is added over `tiles` steps.
  void start(int64_t tiles) {
    parts_ = 0;
    next_ = longest_ = 0;
    tiles_ = tiles > 0 ? tiles : 1;
  }
  // Rows of `width` elements; more than kMostRows would push the present head out of the cache.
  void add(const Rows& rows, int64_t count, int width) {
    count = std::min(count, kMostRows);
    part_[parts_++] = {rows, count, width};
    longest_ = std::max(longest_, count);
    step_ = (longest_ + tiles_ - 1) / tiles_;
  }
  void step() {
    if (next_ >= longest_) return;
    for (int t = 0; t < parts_; t++)
      for (int64_t i = next_; i < std::min(next_ + step_, part_[t].count); i++)
        prefetch_row<1>(part_[t].rows, i, part_[t].width);
    next_ += step_;
  }

 private:
  static constexpr int64_t kMostRows = 512;
  struct Part {
    Rows rows;
    int64_t count;
    int width;
  };
  Part part_[6];
  int parts_ = 0;
  int64_t next_ = 0, longest_ = 0, tiles_ = 1, step_ = 1;
};

DK_INLINE LaneBits first_lanes(int count) { return (LaneBits)((1ull << count) - 1); }

DK_INLINE int64_t max_key_panels(int64_t nk, int64_t prefix) {
  return (prefix + kV - 1) / kV + (nk - prefix + kV - 1) / kV;
}

// Write the key panels that anybody may attend to; return how many. Prefix keys never share a panel with others.
static int64_t find_key_panels(const AttentionParams& p, const Sample& s, KeyPanel* panels) {
  const uint8_t* mask = p.key_mask ? p.key_mask + s.index * p.key_mask_stride_b : nullptr;
  int64_t found = 0;
  for (int64_t key = 0; key < s.nk;) {
    const int64_t end = key < p.prefix_length ? std::min(p.prefix_length, s.nk) : s.nk;
    const int count = (int)(end - key < kV ? end - key : kV);
    const LaneBits allowed = mask ? bits_from_bytes(mask + key, count) : first_lanes(count);
    if (allowed) panels[found++] = {key, key - p.prefix_length, count, allowed, key >= p.prefix_length};
    key += count;
  }
  return found;
}

// Write the row panels with at least one query that is not padding; return how many.
static int64_t find_row_panels(const AttentionParams& p, const Sample& s, RowPanel* panels) {
  const uint8_t* mask = p.query_mask ? p.query_mask + s.index * p.query_mask_stride_b : nullptr;
  int64_t found = 0;
  for (int64_t row = 0; row < s.nq; row += kV) {
    const int count = (int)(s.nq - row < kV ? s.nq - row : kV);
    const LaneBits active = mask ? bits_from_bytes(mask + row, count) : first_lanes(count);
    if (active) panels[found++] = {row, count, active};
  }
  return found;
}

// Mean over all keys of v, masked ones included: what a query with nothing to attend to gets.
static void mean_value(const Rows& v, int64_t nk, int head_dim, float* mean) {
  float row[kMaxHeadDim];
  for (int d = 0; d < head_dim; d++) mean[d] = 0.0f;
  for (int64_t j = 0; j < nk; j++) {
    read_row(v, j, head_dim, head_dim, row);
    for (int d = 0; d < head_dim; d++) mean[d] += row[d];
  }
  for (int d = 0; d < head_dim; d++) mean[d] /= (float)nk;
}

}  // namespace
