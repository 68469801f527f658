// Backward pass by recomputation: scores again through ScoreBlock, probabilities from lse, then all five gradients.
// With ds = p * (dout.v - out.dout) * scale, the derivative of the unscaled score (docs/math.md):
//   dv[j] += p[i,j] dout[i]        dq[i] += ds[i,j] (k[j] + pos_key[delta])     dpos_key[delta] += ds[i,j] q[i]
//                                  dk[j] += ds[i,j] (q[i] + pos_query[delta])   dpos_query[delta] += ds[i,j] k[j]
// score_gradient.h computes p and ds, band_gradient.h what depends on delta. With bfloat16 words p, ds and the sums of
// ds over a distance are rounded before they are multiplied; all sums are float32.
//
// A task owns one head of about kChunkRows queries: several short samples, or a part of a long one. That division
// depends on the shape alone, and sums shared by tasks are added in task order, so results do not depend on the number
// of threads.
#pragma once
#include <algorithm>

#include "band_gradient.h"
#include "score_gradient.h"

namespace {

constexpr int kBackwardRows = 128;    // rows per block: a p2c band of 128 rows wastes 1/8 of its columns, 64 rows 1/4
constexpr int64_t kChunkRows = 1024;  // spreads one long sequence over cores; spares short samples a table sum each
// Up to here rounded weights are not multiplied: errors of so few terms do not average out, and dv would err as much as
// a gradient may.
constexpr int64_t kFewRows = 32;

template <class Word>
class Backward {
  using Score = ScoreBlock<Word>;

 public:
  Backward(const AttentionParams& p, const SlotIndex& index)
      : p_(p), index_(index), head_dim_((int)p.head_dim), padded_((int)round_to_vector(head_dim_)),
        words_(words_of<Word>(head_dim_)), padded_words_(padded_words<Word>(head_dim_)),
        scale_(p.scale / score_factor(p)),
        dropout_{(uint32_t)p.dropout_threshold, (float)p.dropout_scale, (uint64_t)p.seed},
        chunks_(std::max<int64_t>(1, (p.nq + kChunkRows - 1) / kChunkRows)),
        samples_(std::max<int64_t>(1, kChunkRows / std::max<int64_t>(1, p.nq))), turnstile_(p.heads) {}

  bool run() {
    static thread_local ThreadBlock own;
    char* block = own.get(Shared(*this, Arena(nullptr)).bytes);
    if (!block) return false;
    shared_ = Shared(*this, Arena(block));
    const bool done = pack_tables() && run_all();
    own.trim();
    return done;
  }

 private:
  bool run_all() {
    Scratch sizes(*this, Arena(nullptr));
    const int64_t groups = (p_.batch + samples_ - 1) / samples_;
    // Heads vary fastest: tasks that share a turnstile are then far apart and seldom wait.
    return run_tasks(groups * chunks_ * p_.heads, p_.threads, sizes.bytes, [&](int64_t task, char* block) {
      Scratch scratch(*this, Arena(block));
      this->run_task(task % p_.heads, task / p_.heads, scratch);
    });
  }

  struct Scratch {
    KeyPanel* key_panels;
    RowPanel* row_panels;
    float *key_columns, *value_columns, *key_rows, *far, *dk, *dv;  // the keys of the head
    float *dpos_key, *dpos_query;                                   // [columns][padded], pos_key reversed
    float *queries, *douts, *query_rows, *dout_rows, *dq;           // one row block; *_rows pair neighbouring rows
    float *c2p, *p2c, *scores, *dscores, *probability_pairs, *dscore_words, *dscore_pairs;
    typename BandGradient<Word>::Scratch bands;
    RowStatistics statistics;
    float* dmean;  // gradient of the mean value, from rows that got it
    uint16_t* draws;
    NextHead next_head;
    int64_t bytes;

    Scratch(const Backward& b, Arena a) {
      const int64_t panels = max_key_panels(b.p_.nk, b.p_.prefix_length), keys = panels * kV;
      const int64_t table = b.index_.columns * b.padded_, square = kBackwardRows * kBlockKeys;
      key_panels = a.take<KeyPanel>(panels);
      row_panels = a.take<RowPanel>(round_to_vector(b.p_.nq) / kV);
      for (float** words : {&key_columns, &value_columns}) *words = a.take<float>(keys * b.words_);
      key_rows = a.take<float>(keys / Word::kPerWord * b.padded_);
      far = a.take<float>(2 * keys);
      for (float** rows : {&dk, &dv}) *rows = a.take<float>(keys * b.padded_);
      dpos_key = a.take<float>(b.p_.has_pos_key ? table : 0);
      dpos_query = a.take<float>(b.p_.has_pos_query ? table : 0);
      for (float** words : {&queries, &douts}) *words = a.take<float>(kBackwardRows * b.padded_words_);
      query_rows = queries, dout_rows = douts;
      if (Word::kPerWord > 1)
        for (float** pairs : {&query_rows, &dout_rows}) *pairs = a.take<float>(kBackwardRows / 2 * b.padded_);
      dq = a.take<float>(kBackwardRows * b.padded_);
      c2p = a.take<float>(b.p_.has_pos_key ? kBackwardRows * Score::c2p_stride(b.index_) : 0);
      p2c = a.take<float>(b.p_.has_pos_query ? kMicroVectors * Score::p2c_size(b.index_) : 0);
      for (float** tile : {&scores, &dscores}) *tile = a.take<float>(square);
      for (float** copy : {&probability_pairs, &dscore_words, &dscore_pairs})
        *copy = a.take<float>(Weights<Word>::floats(kBackwardRows, kBlockKeys));
      bands.take(a, b.p_, b.index_, kBackwardRows, keys, b.padded_);
      for (float** row : {&statistics.shift, &statistics.factor, &statistics.out_dot_dout, &statistics.dlse})
        *row = a.take<float>(kBackwardRows);
      dmean = a.take<float>(b.padded_);
      draws = a.take<uint16_t>(b.dropout_.on() ? kBlockKeys * kDrawsPerRow : 0);
      bytes = a.used();
    }
  };

  // What all tasks share. The tables of all heads: packed columns for the scores, and for the gradients rows as words
  // that pair neighbouring slots. The sums of dk and dv where several tasks share keys and outputs are not float32.
  struct Shared {
    float *packed = nullptr, *pos_key = nullptr, *pos_query = nullptr;  // pos_key reversed like its columns
    float *dk = nullptr, *dv = nullptr;                                 // or null
    int64_t bytes = 0;
    Shared() = default;
    Shared(const Backward& b, Arena a) {
      const int64_t rows = b.table_words() * b.p_.heads;
      packed = a.take<float>(PackedTables<Word>::floats_per_head(b.p_) * b.p_.heads);
      pos_key = a.take<float>(b.p_.has_pos_key ? rows : 0);
      pos_query = a.take<float>(b.p_.has_pos_query ? rows : 0);
      if (b.chunks_ > 1 && b.p_.dtype != kFloat32)
        for (float** sums : {&dk, &dv}) *sums = a.take<float>(b.keys_of_all() * b.p_.heads * b.head_dim_);
      bytes = a.used();
    }
  };
  int64_t keys_of_all() const { return p_.cu_seqlens ? p_.cu_seqlens[p_.batch] : p_.batch * p_.nk; }
  Rows sums_of(float* sums, const Sample& s, int64_t h) const {
    const int64_t first = h * keys_of_all() + (p_.cu_seqlens ? s.first_token : s.index * p_.nk);
    return {reinterpret_cast<char*>(sums + first * head_dim_), head_dim_ * (int64_t)sizeof(float), kFloat32};
  }
  int64_t table_words() const { return index_.columns / Word::kPerWord * padded_; }  // one table of one head, as rows

  bool pack_tables() {
    return run_tasks(p_.heads, p_.threads, 64, [&](int64_t h, char*) {
      PackedTables<Word>::pack(p_, h, shared_.packed);
      const auto lanes = [](int64_t n) { return first_lanes((int)std::min<int64_t>(kV, std::max<int64_t>(0, n))); };
      for (int64_t c = 0; c < index_.columns; c += kV) {
        const int64_t at = h * table_words() + c / Word::kPerWord * padded_;
        if (p_.has_pos_key) {
          Rows table = pos_key_rows(p_, h);
          table.data += (index_.columns - 1) * table.stride;  // last row first; the first slots may have none
          table.stride = -table.stride;
          pack_values(Word(), table, c, ~lanes(index_.columns - p_.table_rows - c), head_dim_, padded_,
                      shared_.pos_key + at);
        }
        if (p_.has_pos_query)
          pack_values(Word(), pos_query_rows(p_, h), c, lanes(p_.table_rows - c), head_dim_, padded_,
                      shared_.pos_query + at);
      }
    });
  }

  ColumnSource rows_of(const float* rows) const { return {rows, kV, padded_}; }

  void run_task(int64_t h, int64_t turn, Scratch& scratch) {
    const int64_t chunk = turn % chunks_, first = turn / chunks_ * samples_;
    const int64_t last = std::min(p_.batch, first + samples_);
    const int64_t table = index_.columns * padded_;
    if (p_.has_pos_key) clear(scratch.dpos_key, table);
    if (p_.has_pos_query) clear(scratch.dpos_query, table);
    HeadKeys keys{};
    for (int64_t b = first; b < last; b++) {
      const bool more = b + 1 < last;
      ask_for_next(more ? b + 1 : first, more ? h : h + p_.threads, sample_of(p_, b), scratch.next_head);
      keys = head(sample_of(p_, b), h, chunk, scratch);
      if (chunks_ == 1) add_key_gradients(sample_of(p_, b), h, keys, 0, scratch);
    }
    turnstile_.pass(h, turn, [&] {
      if (chunks_ > 1) add_key_gradients(sample_of(p_, first), h, keys, chunk, scratch);
      if (p_.dpos_key) add_table(p_.dpos_key + h * p_.dpos_stride_h, scratch.dpos_key, true, turn == 0);
      if (p_.dpos_query) add_table(p_.dpos_query + h * p_.dpos_stride_h, scratch.dpos_query, false, turn == 0);
    });
  }

  // The task's next sample comes next, or with one thread the next head of the same samples.
  void ask_for_next(int64_t b, int64_t h, const Sample& present, NextHead& next) const {
    next.start((present.nq / kV + 1) * (present.nk / kV + 1));
    if (chunks_ > 1 || h >= p_.heads) return;
    const Sample follows = sample_of(p_, b);
    for (const Tensor4* t : {&p_.q, &p_.out, &p_.dout})
      if (t != &p_.out || follows.nk > kBlockKeys)  // else `out` is not read
        next.add(head_of(p_, *t, follows, h, p_.dtype), follows.nq, head_dim_);
    for (const Tensor4* t : {&p_.k, &p_.v}) next.add(head_of(p_, *t, follows, h, p_.dtype), follows.nk, head_dim_);
  }

  static void clear(float* values, int64_t count) { std::memset(values, 0, (size_t)count * sizeof(float)); }

  // Sum the gradients of one head over a chunk of its queries: dq is written, scratch.dk and scratch.dv are filled for
  // the keys returned, and the table sums grow.
  HeadKeys head(const Sample& s, int64_t h, int64_t chunk, Scratch& scratch) const {
    const int64_t count = find_key_panels(p_, s, scratch.key_panels);
    const int64_t rows = s.nq ? find_row_panels(p_, s, scratch.row_panels) : 0;
    const PackedTables<Word> tables(p_, shared_.packed, h);
    const HeadKeys keys = start_head(s, h, tables, count, scratch);
    if (chunk == 0) padding_rows(s, h, scratch);
    const TableGradient pos_key{p_.has_pos_key ? shared_.pos_key + h * table_words() : nullptr,
                                p_.dpos_key ? scratch.dpos_key : nullptr};
    const TableGradient pos_query{p_.has_pos_query ? shared_.pos_query + h * table_words() : nullptr,
                                  p_.dpos_query ? scratch.dpos_query : nullptr};
    BandGradient<Word> bands(index_, padded_, pos_key, pos_query, scratch.key_rows, p_.dk.data ? scratch.dk : nullptr,
                             scratch.bands);
    bands.start_head(count * kV);

    const int64_t chunk_panels = kChunkRows / kV, per_block = kBackwardRows / kV;
    const int64_t stop = chunk + 1 == chunks_ ? rows : std::min(rows, (chunk + 1) * chunk_panels);
    for (int64_t r = chunk * chunk_panels; r < stop; r += per_block) {
      const BlockRows block{scratch.row_panels + r, (int)std::min(per_block, stop - r), scratch.queries};
      row_block(s, h, keys, tables, block, bands, r > chunk * chunk_panels, scratch);
    }
    if (stop <= chunk * chunk_panels) clear_keys(0, count, scratch);
    bands.finish_head(s, count * kV, pos_query_rows(p_, h), head_dim_);
    return keys;
  }

  HeadKeys start_head(const Sample& s, int64_t h, const PackedTables<Word>& tables, int64_t count,
                      Scratch& scratch) const {
    const Rows k = head_of(p_, p_.k, s, h, p_.dtype), v = head_of(p_, p_.v, s, h, p_.dtype);
    for (int64_t i = 0; i < count; i++) {
      const KeyPanel& panel = scratch.key_panels[i];
      pack_panel<Word>(v, panel.key, panel.allowed, head_dim_, scratch.value_columns + i * words_ * kV);
      pack_values(Word(), k, panel.key, panel.allowed, head_dim_, padded_,
                  scratch.key_rows + i * kV / Word::kPerWord * padded_);
    }
    clear(scratch.dmean, padded_);
    return pack_keys<Word>(p_, index_, tables, s, k, scratch.key_panels, count, scratch.key_columns, scratch.far);
  }

  void clear_keys(int64_t first, int64_t panels, Scratch& scratch) const {
    for (float* sums : {scratch.dk, scratch.dv}) clear(sums + first * kV * padded_, panels * kV * padded_);
  }

  // A query that got the mean of v hands its gradient to every key alike.
  void empty_row(const Sample& s, int64_t h, int64_t row, Scratch& scratch) const {
    float dout[kMaxHeadDim];
    read_row(head_of(p_, p_.dout, s, h, p_.dtype), row, head_dim_, head_dim_, dout);
    for (int d = 0; d < head_dim_; d++) scratch.dmean[d] += dout[d] / (float)s.nk;
    const size_t bytes = (size_t)(head_dim_ * bytes_of(p_.dtype));
    if (p_.dq.data) std::memset(head_of(p_, p_.dq, s, h, p_.dtype).row(row), 0, bytes);
  }

  void padding_rows(const Sample& s, int64_t h, Scratch& scratch) const {
    if (!p_.query_mask) return;
    const uint8_t* mask = p_.query_mask + s.index * p_.query_mask_stride_b;
    for (int64_t row = 0; row < s.nq; row++)
      if (!mask[row]) empty_row(s, h, row, scratch);
  }

  // Pack queries and dout, and each row's lse and out . dout; rows without probabilities are zero. `whole`: one block
  // holds all keys, so that out . dout comes from them.
  void start_block(const Sample& s, int64_t h, const BlockRows& rows, bool whole, Scratch& scratch) const {
    const Rows q = head_of(p_, p_.q, s, h, p_.dtype), dout = head_of(p_, p_.dout, s, h, p_.dtype);
    const float* lse = statistics_of(p_, p_.lse, s, h);
    for (int r = 0; r < rows.count; r++) {
      const RowPanel& panel = rows.panels[r];
      LaneBits used = 0;
      for (int lane = 0; lane < panel.count; lane++) {
        if (!(panel.active >> lane & 1)) continue;
        if (lse[panel.row + lane] != -INFINITY) used |= 1u << lane;
        else empty_row(s, h, panel.row + lane, scratch);
      }
      for (int lane = 0; lane < kV; lane++) {
        start_row(s, h, r * kV + lane, panel.row + lane, used >> lane & 1, scratch);
        if (!whole && (used >> lane & 1))
          scratch.statistics.out_dot_dout[r * kV + lane] = out_dot_dout(s, h, panel.row + lane);
      }
      if (Word::kPerWord == 1) continue;
      pack_values(Word(), q, panel.row, used, head_dim_, padded_, scratch.query_rows + r * kV / 2 * padded_);
      pack_values(Word(), dout, panel.row, used, head_dim_, padded_, scratch.dout_rows + r * kV / 2 * padded_);
    }
    clear(scratch.dq, rows.count * kV * padded_);
  }

  void start_row(const Sample& s, int64_t h, int r, int64_t row, bool used, Scratch& scratch) const {
    float *query = scratch.queries + r * padded_words_, *gradient = scratch.douts + r * padded_words_;
    const RowStatistics& statistics = scratch.statistics;
    statistics.shift[r] = INFINITY;
    statistics.factor[r] = 1.0f;
    statistics.out_dot_dout[r] = statistics.dlse[r] = 0.0f;
    if (!used) {
      clear(query, padded_words_);
      clear(gradient, padded_words_);
      return;
    }
    read_words(Word(), head_of(p_, p_.q, s, h, p_.dtype), row, head_dim_, query);
    read_words(Word(), head_of(p_, p_.dout, s, h, p_.dtype), row, head_dim_, gradient);
    const float* dlse = statistics_of(p_, p_.dlse, s, h);
    statistics.dlse[r] = dlse ? dlse[row] : 0.0f;
    statistics.shift[r] = (float)((double)statistics_of(p_, p_.lse, s, h)[row] / scale_);
  }

  float out_dot_dout(const Sample& s, int64_t h, int64_t row) const {
    float out[kMaxHeadDim], dout[kMaxHeadDim];
    read_row(head_of(p_, p_.out, s, h, p_.dtype), row, head_dim_, padded_, out);
    read_row(head_of(p_, p_.dout, s, h, p_.dtype), row, head_dim_, padded_, dout);
    vf dot = zero();
    for (int d = 0; d < padded_; d += kV) dot = fma(load(out + d), load(dout + d), dot);
    return reduce_add(dot);
  }

  // `later`: a block before this one has started dk and dv.
  void row_block(const Sample& s, int64_t h, const HeadKeys& keys, const PackedTables<Word>& tables,
                 const BlockRows& rows, BandGradient<Word>& bands, bool later, Scratch& scratch) const {
    start_block(s, h, rows, keys.count <= kBlockKeys / kV, scratch);
    const uint8_t* pair = p_.pair_mask;
    if (pair) pair += s.index * p_.pair_mask_stride_b + h * p_.pair_mask_stride_h;
    const Score score{
        p_, index_, tables, keys, rows, pair, scratch.c2p, scratch.p2c, words_, padded_words_, &scratch.next_head};
    const ScoreGradient<Word> gradient{
        dropout_,        (float)p_.scale, (float)(scale_ * kLog2E),  scratch.statistics,   scratch.scores,
        scratch.dscores, scratch.draws,   scratch.probability_pairs, scratch.dscore_words, scratch.dscore_pairs};
    score.start_rows();
    bands.start_rows(score, p_.dq.data ? scratch.dq : nullptr);
    const uint64_t stream = (uint64_t)(s.index * p_.heads + h);
    for (int64_t k = 0; k < keys.count; k += kBlockKeys / kV) {
      const int panels = (int)std::min<int64_t>(kBlockKeys / kV, keys.count - k);
      if (!score.any_allowed(k, panels)) {
        if (!later) clear_keys(k, panels, scratch);
        continue;
      }
      score.scores(k, panels, scratch.scores);
      gemm<Word>(rows.count * kV, panels, words_, {scratch.douts, padded_words_, 1},
                 {scratch.value_columns + k * words_ * kV, (ptrdiff_t)words_ * kV, kV}, scratch.dscores, kBlockKeys,
                 false);
      for (int r = 0; r < rows.count; r++)
        gradient.row_panel(stream, rows.panels[r], r * kV, keys.panels + k, panels, panels == keys.count);
      token_gradients(rows.count * kV, k, panels, gradient, later, scratch);
      if (tables.pos_key || tables.pos_query)
        for (int i = 0; i < panels; i++)
          if (keys.panels[k + i].has_position) bands.add_panel(score, k + i, scratch.dscores + i * kV);
    }
    bands.finish_rows(score, scratch.query_rows);
    if (p_.dq.data) store_dq(s, h, rows, scratch);
  }

  // dq, dk, dv through the content term; adds to dk and dv if they are `started`.
  void token_gradients(int count, int64_t first, int panels, const ScoreGradient<Word>& gradient, bool started,
                       Scratch& scratch) const {
    const int keys = panels * kV, vectors = padded_ / kV, row_words = count / Word::kPerWord;
    const Weights<Word> p = gradient.probabilities(), ds = gradient.gradients();
    if (p_.dv.data)
      gemm<Word>(keys, vectors, row_words, p.over_rows(0, 0), rows_of(scratch.dout_rows),
                 scratch.dv + first * kV * padded_, padded_, started);
    if (p_.dk.data)
      gemm<Word>(keys, vectors, row_words, ds.over_rows(0, 0), rows_of(scratch.query_rows),
                 scratch.dk + first * kV * padded_, padded_, started);
    if (p_.dq.data)
      gemm<Word>(count, vectors, keys / Word::kPerWord, ds.over_columns(0, 0),
                 rows_of(scratch.key_rows + first * kV / Word::kPerWord * padded_), scratch.dq, padded_, true);
  }

  void store_dq(const Sample& s, int64_t h, const BlockRows& rows, const Scratch& scratch) const {
    const Rows dq = head_of(p_, p_.dq, s, h, p_.dtype);
    for (int r = 0; r < rows.count * kV; r++) {
      const RowPanel& panel = rows.panels[r / kV];
      const int lane = r % kV;
      if (lane < panel.count && (panel.active >> lane & 1))
        write_row(scratch.dq + r * padded_, head_dim_, dq, panel.row + lane);
    }
  }

  // Add dk and dv of one sample to what the chunks before left; the last chunk writes the outputs.
  void add_key_gradients(const Sample& s, int64_t h, const HeadKeys& keys, int64_t chunk,
                         const Scratch& scratch) const {
    const auto add_keys = [&](const Tensor4& to, float* sums, const float* own, const float* every) {
      const Rows out = head_of(p_, to, s, h, p_.dtype), left = sums ? sums_of(sums, s, h) : out;
      add_to_keys(s, left, chunk + 1 == chunks_ ? out : left, keys, own, every, chunk == 0);
    };
    if (p_.dk.data) add_keys(p_.dk, shared_.dk, scratch.dk, nullptr);
    if (p_.dv.data) add_keys(p_.dv, shared_.dv, scratch.dv, scratch.dmean);
  }

  // Every key gets `every` (or nothing), the keys of the panels their own sums as well.
  void add_to_keys(const Sample& s, const Rows& from, const Rows& to, const HeadKeys& keys, const float* sums,
                   const float* every, bool overwrite) const {
    float row[kMaxHeadDim];
    int64_t panel = 0;
    for (int64_t j = 0; j < s.nk; j++) {
      while (panel < keys.count && keys.panels[panel].key + keys.panels[panel].count <= j) panel++;
      const int64_t lane = panel < keys.count ? j - keys.panels[panel].key : -1;
      const bool summed = lane >= 0 && (keys.panels[panel].allowed >> lane & 1);
      if (overwrite) clear(row, padded_);
      else read_row(from, j, head_dim_, padded_, row);
      if (every) add(row, every);
      if (summed) add(row, sums + (panel * kV + lane) * padded_);
      write_row(row, head_dim_, to, j);
    }
  }

  void add(float* row, const float* more) const {
    for (int d = 0; d < padded_; d += kV) store(row + d, load(row + d) + load(more + d));
  }

  void add_table(float* to, float* sums, bool reversed, bool overwrite) const {
    for (int64_t slot = 0; slot < p_.table_rows; slot++) {
      float* from = sums + (reversed ? index_.columns - 1 - slot : slot) * padded_;
      if (!overwrite)
        for (int d = 0; d < head_dim_; d++) from[d] += to[slot * head_dim_ + d];
      copy_floats(from, head_dim_, to + slot * head_dim_);
    }
  }

  const AttentionParams& p_;
  const SlotIndex& index_;
  const int head_dim_, padded_, words_, padded_words_;
  const double scale_;  // of the scores as ScoreBlock makes them
  const Dropout dropout_;
  const int64_t chunks_;   // tasks per sample, where a sample is long
  const int64_t samples_;  // samples per task, where they are short
  Turnstile turnstile_;
  Shared shared_;
};

}  // namespace
