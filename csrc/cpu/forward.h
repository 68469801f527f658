// Forward pass: softmax over key blocks with a running maximum, one row block at a time.
#pragma once
#include <algorithm>

#include "dropout.h"
#include "old_glibc.h"
#include "parallel.h"
#include "score.h"

namespace {

constexpr int kForwardRows = 128;  // rows per block: a p2c band of 128 rows wastes 1/8 of its columns, 64 rows 1/4
constexpr int kValueWords = 128;   // summed words per step of P . V: that slice of V stays in L1

template <class Word>
class Forward {
 public:
  Forward(const AttentionParams& p, const SlotIndex& index, const float* packed)
      : p_(p), index_(index), packed_(packed), head_dim_((int)p.head_dim), words_(words_of<Word>(head_dim_)),
        padded_words_(padded_words<Word>(head_dim_)), padded_((int)round_to_vector(head_dim_)),
        scale_(p.scale / score_factor(p)), scale_log2_((float)(scale_ * kLog2E)),
        value_factor_(std::ldexp(1.0f, -std::ilogb((float)std::max<int64_t>(1, p.nk)) - 1)),
        dropout_{(uint32_t)p.dropout_threshold, (float)p.dropout_scale, (uint64_t)p.seed} {}

  bool run() {
    const int64_t heads = p_.batch * p_.heads;
    if (!heads) return true;
    const int64_t blocks = (p_.nq + kForwardRows - 1) / kForwardRows;
    // Rows are independent, so how they are shared out changes no result.
    chunks_ = std::max<int64_t>(1, std::min(blocks, (4 * p_.threads + heads - 1) / heads));
    if (p_.threads <= 1) chunks_ = 1;
    Scratch sizes(*this, Arena(nullptr));
    return run_tasks(heads * chunks_, p_.threads, sizes.bytes, [&](int64_t task, char* block) {
      Scratch scratch(*this, Arena(block));
      const int64_t head = task / chunks_;
      this->head(sample_of(p_, head / p_.heads), head % p_.heads, task % chunks_, scratch);
    });
  }

 private:
  struct Scratch {
    KeyPanel* key_panels;
    RowPanel* row_panels;
    float *key_columns, *far, *values, *mean;
    float *queries, *c2p, *p2c, *scores, *maxima, *row_max, *row_sum, *output;
    uint16_t* draws;
    int64_t bytes;
    NextHead next_head;
    bool mean_ready = false;  // `mean` holds the mean value of the current head

    Scratch(const Forward& f, Arena a) {
      const int64_t panels = max_key_panels(f.p_.nk, f.p_.prefix_length);
      key_panels = a.take<KeyPanel>(panels);
      row_panels = a.take<RowPanel>(round_to_vector(f.p_.nq) / kV);
      key_columns = a.take<float>(panels * kV * f.words_);
      far = a.take<float>(2 * panels * kV);
      values = a.take<float>(panels * kV / Word::kPerWord * f.padded_);
      mean = a.take<float>(f.padded_);
      queries = a.take<float>(kForwardRows * f.padded_words_);
      c2p = a.take<float>(f.p_.has_pos_key ? kForwardRows * ScoreBlock<Word>::c2p_stride(f.index_) : 0);
      p2c = a.take<float>(f.p_.has_pos_query ? kMicroVectors * ScoreBlock<Word>::p2c_size(f.index_) : 0);
      scores = a.take<float>(kForwardRows * kBlockKeys);
      maxima = a.take<float>(kForwardRows * kV);
      row_max = a.take<float>(kForwardRows);
      row_sum = a.take<float>(kForwardRows);
      output = a.take<float>(kForwardRows * f.padded_);
      draws = a.take<uint16_t>(kV * kDrawsPerRow);
      bytes = a.used();
    }
  };

  void head(const Sample& s, int64_t h, int64_t chunk, Scratch& scratch) const {
    if (s.nq == 0) return;
    const int64_t rows = find_row_panels(p_, s, scratch.row_panels);
    const int64_t per_block = kForwardRows / kV, blocks = (rows + per_block - 1) / per_block;
    const int64_t first = blocks * chunk / chunks_, last = blocks * (chunk + 1) / chunks_;
    const Rows v = head_of(p_, p_.v, s, h, p_.dtype);
    scratch.mean_ready = false;
    if (chunk == 0) padding_rows(s, h, v, scratch);
    if (first == last) return;

    const PackedTables<Word> tables(p_, packed_, h);
    const int64_t count = find_key_panels(p_, s, scratch.key_panels);
    const HeadKeys keys = pack_keys<Word>(p_, index_, tables, s, head_of(p_, p_.k, s, h, p_.dtype), scratch.key_panels,
                                          count, scratch.key_columns, scratch.far);
    for (int64_t i = 0; i < count; i++) {
      const KeyPanel& panel = keys.panels[i];
      pack_values(Word(), v, panel.key, panel.allowed, head_dim_, padded_,
                  scratch.values + i * kV / Word::kPerWord * padded_);
    }
    for (int64_t i = 0; i < count * kV / Word::kPerWord * padded_; i += kV)
      store(scratch.values + i, Word::scaled(load(scratch.values + i), set1(value_factor_)));
    for (int64_t b = first; b < last; b++) {
      const BlockRows block{scratch.row_panels + b * per_block, (int)std::min(per_block, rows - b * per_block),
                            scratch.queries};
      scratch.next_head.start(block.count * count);
      ask_for_output(s, h, block, scratch.next_head);
      if (b + 1 == last) ask_for_next(s, h, scratch.next_head);
      row_block(s, h, keys, tables, block, v, scratch);
    }
  }

  void ask_for_output(const Sample& s, int64_t h, const BlockRows& block, NextHead& next) const {
    const RowPanel &first = block.panels[0], &last = block.panels[block.count - 1];
    Rows out = head_of(p_, p_.out, s, h, p_.dtype);
    out.data = out.row(first.row);
    next.add(out, last.row + last.count - first.row, head_dim_);
  }

  // With one thread the next head follows this one; more threads share the heads out nearly in order.
  void ask_for_next(const Sample& s, int64_t h, NextHead& next) const {
    const int64_t head = s.index * p_.heads + h + p_.threads;
    if (chunks_ > 1 || head >= p_.batch * p_.heads) return;
    const Sample follows = sample_of(p_, head / p_.heads);
    next.add(head_of(p_, p_.q, follows, head % p_.heads, p_.dtype), follows.nq, head_dim_);
    next.add(head_of(p_, p_.k, follows, head % p_.heads, p_.dtype), follows.nk, head_dim_);
    next.add(head_of(p_, p_.v, follows, head % p_.heads, p_.dtype), follows.nk, head_dim_);
    const PackedTables<Word> tables(p_, packed_, head % p_.heads);
    // The slots that the first rows need.
    const int64_t rows = std::min<int64_t>(follows.nq, kForwardRows);
    if (tables.pos_key) ask_for_table(tables.pos_key, index_.key_slot(-rows), index_.key_slot(follows.nk), next);
    if (tables.pos_query)
      ask_for_table(tables.pos_query, index_.query_slot(-follows.nk), index_.query_slot(rows), next);
  }

  void ask_for_table(const float* table, int64_t low, int64_t high, NextHead& next) const {
    char* first = const_cast<char*>(reinterpret_cast<const char*>(table + low / kV * kV * words_));
    next.add({first, words_ * (int64_t)sizeof(float), kFloat32}, round_to_vector(high + 1) - low / kV * kV, words_);
  }

  void row_block(const Sample& s, int64_t h, const HeadKeys& keys, const PackedTables<Word>& tables,
                 const BlockRows& rows, const Rows& v, Scratch& scratch) const {
    const Rows q = head_of(p_, p_.q, s, h, p_.dtype);
    const int count = rows.count * kV;
    for (int r = 0; r < count; r++) {
      const RowPanel& panel = rows.panels[r / kV];
      float* to = scratch.queries + r * padded_words_;
      if (r % kV < panel.count) read_words(Word(), q, panel.row + r % kV, head_dim_, to);
      else std::memset(to, 0, (size_t)padded_words_ * sizeof(float));
    }
    const uint8_t* pair = p_.pair_mask;
    if (pair) pair += s.index * p_.pair_mask_stride_b + h * p_.pair_mask_stride_h;
    const ScoreBlock<Word> score{
        p_, index_, tables, keys, rows, pair, scratch.c2p, scratch.p2c, words_, padded_words_, &scratch.next_head};
    score.start_rows();
    std::fill(scratch.row_max, scratch.row_max + count, -INFINITY);
    std::fill(scratch.row_sum, scratch.row_sum + count, 0.0f);
    bool started = false;
    for (int64_t k = 0; k < keys.count; k += kBlockKeys / kV) {
      const int panels = (int)std::min<int64_t>(kBlockKeys / kV, keys.count - k);
      if (!score.any_allowed(k, panels)) continue;
      score.scores(k, panels, scratch.scores, scratch.maxima);
      softmax(count, panels, started, scratch);
      if (dropout_.on()) drop(s, h, rows, keys.panels + k, panels, scratch);
      accumulate(count, k, panels, started, scratch);
      started = true;
    }
    finish_rows(s, h, rows, v, scratch);
  }

  // Turn scores into exp(scale * (score - running maximum)), in place, and rescale what was summed under the old
  // maximum. Statistics of kV rows are computed together, a row a lane.
  void softmax(int count, int panels, bool started, Scratch& scratch) const {
    const vf scale = set1(scale_log2_);
    for (int first = 0; first < count; first += kV) {
      vf sums[kV];
      float shift[kV], factor[kV];
      for (int r = 0; r < kV; r++) sums[r] = load(scratch.maxima + (first + r) * kV);
      float *row_max = scratch.row_max + first, *row_sum = scratch.row_sum + first;
      const vf old = load(row_max), now = max_keep_nan(fold_lanes<true>(sums), old);
      store(row_max, now);
      for (int r = 0; r < kV; r++) shift[r] = row_max[r] == -INFINITY ? 0.0f : row_max[r];  // nothing allowed yet
      const vf rescale = exp2_nonpositive((old - load(shift)) * scale);
      store(factor, rescale);
      for (int r = 0; r < kV; r++)
        sums[r] = exponentials(scratch.scores + (first + r) * kBlockKeys, panels * kV, set1(shift[r]), scale);
      store(row_sum, fma(load(row_sum), rescale, fold_lanes<false>(sums)));
      for (int r = 0; started && r < kV; r++)
        if (factor[r] != 1.0f)
          for (int d = 0; d < padded_; d += kV) {
            float* o = scratch.output + (first + r) * padded_ + d;
            store(o, load(o) * set1(factor[r]));
          }
    }
  }

  // Largest element or sum of each of kV vectors: lane r of the result is that of x[r].
  template <bool kMaximum>
  DK_INLINE_MEMBER static vf fold_lanes(vf* x) {
    transpose(x);
    DK_UNROLL
    for (int half = kV / 2; half; half /= 2) {
      DK_UNROLL
      for (int i = 0; i < half; i++) x[i] = kMaximum ? max_keep_nan(x[i], x[i + half]) : x[i] + x[i + half];
    }
    return x[0];
  }

  // One row of scores to words of probabilities, or to floats where dropout comes first; return their sums.
  DK_INLINE_MEMBER vf exponentials(float* score, int columns, vf shift, vf scale) const {
    vf sum = zero();
    int c = 0;
#ifdef DK_HAS_BF16_DOT
    if (Word::kPerWord == 2 && !dropout_.on()) {
      uint16_t* to = reinterpret_cast<uint16_t*>(score);  // never ahead of what is still to be read
      for (; c + 2 * kV <= columns; c += 2 * kV) {
        const vf e = exp2_for_bfloat16((load(score + c) - shift) * scale);
        const vf f = exp2_for_bfloat16((load(score + c + kV) - shift) * scale);
        sum = sum + (e + f);
        store_bf16(to + c, e, f);
      }
      if (c < columns) {
        const vf e = exp2_for_bfloat16((load(score + c) - shift) * scale);
        sum = sum + e;
        store_bf16(to + c, e);
      }
      return sum;
    }
#endif
    for (; c < columns; c += kV) {
      const vf e = exp2_nonpositive((load(score + c) - shift) * scale);
      sum = sum + e;
      store(score + c, e);
    }
    return sum;
  }

  // Zero the probabilities that dropout drops; the factor of the others waits for float32 in finish_rows.
  void drop(const Sample& s, int64_t h, const BlockRows& rows, const KeyPanel* panels, int count,
            Scratch& scratch) const {
    const uint64_t stream = (uint64_t)(s.index * p_.heads + h);
    for (int r = 0; r < rows.count; r++)
      for (int i = 0; i < count; i++) {
        draw_tile(dropout_, stream, rows.panels[r].row, panels[i].key, scratch.draws);
        for (int lane = 0; lane < kV; lane++) {
          float* e = scratch.scores + (r * kV + lane) * kBlockKeys + i * kV;
          const uint16_t* draws = scratch.draws + lane * kDrawsPerRow + (panels[i].key & 7);
          store(e, load(e) * keep_factor(draws, dropout_.threshold, 1.0f));
#ifdef DK_HAS_BF16_DOT
          if (Word::kPerWord == 2)
            store_bf16(reinterpret_cast<uint16_t*>(scratch.scores + (r * kV + lane) * kBlockKeys) + i * kV, load(e));
#endif
        }
      }
  }

  // output += probabilities . values.
  void accumulate(int count, int64_t first, int panels, bool started, Scratch& scratch) const {
    const int words = panels * kV / Word::kPerWord;
    const float* values = scratch.values + first * kV / Word::kPerWord * padded_;
    for (int w = 0; w < words; w += kValueWords)
      gemm<Word>(count, padded_ / kV, std::min(kValueWords, words - w), {scratch.scores + w, kBlockKeys, 1},
                 {values + w * padded_, kV, padded_}, scratch.output, padded_, started || w > 0);
  }

  void finish_rows(const Sample& s, int64_t h, const BlockRows& rows, const Rows& v, Scratch& scratch) const {
    const Rows out = head_of(p_, p_.out, s, h, p_.dtype);
    float* lse = statistics_of(p_, p_.lse, s, h);
    for (int r = 0; r < rows.count * kV; r++) {
      const RowPanel& panel = rows.panels[r / kV];
      if (r % kV >= panel.count || !(panel.active >> (r % kV) & 1)) continue;
      const int64_t row = panel.row + r % kV;
      const float sum = scratch.row_sum[r];
      if (sum == 0.0f) {
        empty_row(s, row, out, lse, v, scratch);
        continue;
      }
      float* o = scratch.output + r * padded_;
      const vf inverse = set1((dropout_.on() ? dropout_.scale : 1.0f) / sum / value_factor_);
      for (int d = 0; d < padded_; d += kV) store(o + d, load(o + d) * inverse);
      write_row(o, head_dim_, out, row);
      lse[row] = (float)((double)scratch.row_max[r] * scale_ + std::log((double)sum));
    }
  }

  // A query with nothing to attend to gets the mean of v; see docs/math.md.
  void empty_row(const Sample& s, int64_t row, const Rows& out, float* lse, const Rows& v, Scratch& scratch) const {
    if (!scratch.mean_ready) mean_value(v, s.nk, head_dim_, scratch.mean);
    scratch.mean_ready = true;
    write_row(scratch.mean, head_dim_, out, row);
    lse[row] = -INFINITY;
  }

  void padding_rows(const Sample& s, int64_t h, const Rows& v, Scratch& scratch) const {
    if (!p_.query_mask) return;
    const uint8_t* mask = p_.query_mask + s.index * p_.query_mask_stride_b;
    const Rows out = head_of(p_, p_.out, s, h, p_.dtype);
    float* lse = statistics_of(p_, p_.lse, s, h);
    for (int64_t row = 0; row < s.nq; row++)
      if (!mask[row]) empty_row(s, row, out, lse, v, scratch);
  }

  const AttentionParams& p_;
  const SlotIndex& index_;
  const float* packed_;
  const int head_dim_, words_, padded_words_, padded_;
  const double scale_;  // of the scores as ScoreBlock makes them
  const float scale_log2_;
  const float value_factor_;  // below 1 / nk: sums over keys stay finite where their mean is; a power of two, so exact
  const Dropout dropout_;
  int64_t chunks_ = 1;
};

}  // namespace
