// Backward pass by recomputation: scores again through ScoreBlock, probabilities from lse, then all five gradients.
// With ds = p * (dout.v - out.dout) * scale, the derivative of the unscaled score (docs/math.md):
//   dv[j] += p[i,j] dout[i]        dq[i] += ds[i,j] (k[j] + pos_key[delta])     dpos_key[delta] += ds[i,j] q[i]
//                                  dk[j] += ds[i,j] (q[i] + pos_query[delta])   dpos_query[delta] += ds[i,j] k[j]
// The sums over delta first collect ds in the same bands that the forward reads (tile by tile, along the diagonals);
// one product per band then serves the token's and the table's gradient. All arithmetic is float32.
//
// A task owns one head of about kChunkRows queries: several short samples, or a part of a long one. That division
// depends on the shape alone, and sums shared by tasks are added in task order, so results do not depend on the number
// of threads.
#pragma once
#include <algorithm>

#include "dropout.h"
#include "parallel.h"
#include "score.h"

namespace {

constexpr int kBackwardRows = 64;      // two score blocks and two c2p bands of 64 rows share the L2 with the keys
constexpr int64_t kChunkRows = 1024;   // spreads one long sequence over cores; spares short samples a table sum each
constexpr int kBandWords = 128;        // summed columns per step: that slice of a table stays in L1

class Backward {
  using Score = ScoreBlock<FloatWord>;

 public:
  Backward(const AttentionParams& p, const SlotIndex& index)
      : p_(p), index_(index), head_dim_((int)p.head_dim), padded_((int)round_to_vector(head_dim_)),
        scale_log2_((float)(p.scale * kLog2E)),
        dropout_{(uint32_t)p.dropout_threshold, (float)p.dropout_scale, (uint64_t)p.seed},
        chunks_(std::max<int64_t>(1, (p.nq + kChunkRows - 1) / kChunkRows)),
        samples_(std::max<int64_t>(1, kChunkRows / std::max<int64_t>(1, p.nq))), turnstile_(p.heads) {}

  bool run() {
    static thread_local ThreadBlock own;
    TableRows sizes_of_tables(*this, Arena(nullptr));
    char* block = own.get(sizes_of_tables.bytes);
    if (!block) return false;
    tables_ = TableRows(*this, Arena(block));
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
    float *key_columns, *value_columns, *key_rows, *far, *dfar, *dk, *dv;  // the keys of the head
    float *dpos_key, *dpos_query;                                          // [columns][padded], pos_key reversed
    float *queries, *douts, *c2p, *dc2p, *p2c, *dp2c, *scores, *dscores, *row_far, *dq;  // one row block
    // Per row: probability = exp(scale * (score - shift)) * factor. shift is lse / scale, since scores are unscaled,
    // and infinite for rows without probabilities, which makes all of them 0.
    float *shift, *factor, *out_dot_dout, *dlse;
    float* dmean;  // gradient of the mean value, from rows that got it
    uint16_t* draws;
    NextHead next_head;
    int64_t bytes;

    Scratch(const Backward& b, Arena a) {
      const int64_t panels = max_key_panels(b.p_.nk, b.p_.prefix_length), keys = panels * kV;
      const int64_t table = b.index_.columns * b.padded_, band = b.index_.columns + kV;
      key_panels = a.take<KeyPanel>(panels);
      row_panels = a.take<RowPanel>(round_to_vector(b.p_.nq) / kV);
      for (float** rows : {&key_columns, &value_columns, &key_rows, &dk, &dv}) *rows = a.take<float>(keys * b.padded_);
      far = a.take<float>(2 * keys);
      dfar = a.take<float>(2 * keys);
      dpos_key = a.take<float>(b.p_.has_pos_key ? table : 0);
      dpos_query = a.take<float>(b.p_.has_pos_query ? table : 0);
      for (float** rows : {&queries, &douts, &dq}) *rows = a.take<float>(kBackwardRows * b.padded_);
      for (float** rows : {&c2p, &dc2p}) *rows = a.take<float>(b.p_.has_pos_key ? kBackwardRows * band : 0);
      p2c = a.take<float>(b.p_.has_pos_query ? kMicroVectors * Score::p2c_size(b.index_) : 0);
      dp2c = a.take<float>(b.p_.has_pos_query ? kV * band : 0);
      scores = a.take<float>(kBackwardRows * kBlockKeys);
      dscores = a.take<float>(kBackwardRows * kBlockKeys);
      row_far = a.take<float>(2 * kBackwardRows * kV);
      for (float** row : {&shift, &factor, &out_dot_dout, &dlse}) *row = a.take<float>(kBackwardRows);
      dmean = a.take<float>(b.padded_);
      draws = a.take<uint16_t>(kV * kDrawsPerRow);
      bytes = a.used();
    }
  };

  // The tables of all heads, shared by all tasks: packed columns for the scores, and plain rows for the gradients.
  struct TableRows {
    float *packed = nullptr, *pos_key = nullptr, *pos_query = nullptr;  // pos_key reversed like its columns
    int64_t bytes = 0;
    TableRows() = default;
    TableRows(const Backward& b, Arena a) {
      const int64_t table = b.index_.columns * b.padded_ * b.p_.heads;
      packed = a.take<float>(PackedTables<FloatWord>::floats_per_head(b.p_) * b.p_.heads);
      pos_key = a.take<float>(b.p_.has_pos_key ? table : 0);
      pos_query = a.take<float>(b.p_.has_pos_query ? table : 0);
      bytes = a.used();
    }
  };

  bool pack_tables() {
    const int64_t table = index_.columns * padded_;
    return run_tasks(p_.heads, p_.threads, 64, [&](int64_t h, char*) {
      PackedTables<FloatWord>::pack(p_, h, tables_.packed);
      const int64_t empty = (index_.columns - p_.table_rows) * padded_;  // met by zero weights only, but NaN * 0 = NaN
      if (p_.has_pos_key) clear(tables_.pos_key + h * table, empty);
      if (p_.has_pos_query) clear(tables_.pos_query + (h + 1) * table - empty, empty);
      for (int64_t slot = 0; slot < p_.table_rows; slot++) {
        if (p_.has_pos_key)
          read_row(pos_key_rows(p_, h), slot, head_dim_, padded_,
                   tables_.pos_key + h * table + (index_.columns - 1 - slot) * padded_);
        if (p_.has_pos_query)
          read_row(pos_query_rows(p_, h), slot, head_dim_, padded_,
                   tables_.pos_query + h * table + slot * padded_);
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
      if (chunks_ == 1) add_key_gradients(sample_of(p_, b), h, keys, true, scratch);
    }
    turnstile_.pass(h, turn, [&] {
      if (chunks_ > 1) add_key_gradients(sample_of(p_, first), h, keys, chunk == 0, scratch);
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
      next.add(head_of(p_, *t, follows, h, p_.dtype), follows.nq, head_dim_);
    for (const Tensor4* t : {&p_.k, &p_.v}) next.add(head_of(p_, *t, follows, h, p_.dtype), follows.nk, head_dim_);
  }

  static void clear(float* values, int64_t count) { std::memset(values, 0, (size_t)count * sizeof(float)); }

  // Sum the gradients of one head over a chunk of its queries: dq is written, scratch.dk and scratch.dv are filled for
  // the keys returned, and the table sums grow.
  HeadKeys head(const Sample& s, int64_t h, int64_t chunk, Scratch& scratch) const {
    const int64_t count = find_key_panels(p_, s, scratch.key_panels);
    const int64_t rows = s.nq ? find_row_panels(p_, s, scratch.row_panels) : 0;
    const PackedTables<FloatWord> tables(p_, tables_.packed, h);
    const HeadKeys keys = start_head(s, h, tables, count, scratch);
    if (chunk == 0) padding_rows(s, h, scratch);

    const int64_t chunk_panels = kChunkRows / kV, per_block = kBackwardRows / kV;
    const int64_t stop = chunk + 1 == chunks_ ? rows : std::min(rows, (chunk + 1) * chunk_panels);
    for (int64_t r = chunk * chunk_panels; r < stop; r += per_block) {
      const BlockRows block{scratch.row_panels + r, (int)std::min(per_block, stop - r), scratch.queries};
      row_block(s, h, keys, tables, block, scratch);
    }
    finish_far(h, keys, scratch);
    return keys;
  }

  HeadKeys start_head(const Sample& s, int64_t h, const PackedTables<FloatWord>& tables, int64_t count,
                      Scratch& scratch) const {
    const Rows k = head_of(p_, p_.k, s, h, p_.dtype), v = head_of(p_, p_.v, s, h, p_.dtype);
    for (int64_t i = 0; i < count; i++) {
      const KeyPanel& panel = scratch.key_panels[i];
      pack_panel<FloatWord>(v, panel.key, panel.allowed, head_dim_, scratch.value_columns + i * head_dim_ * kV);
      pack_values(FloatWord(), k, panel.key, panel.allowed, head_dim_, padded_, scratch.key_rows + i * kV * padded_);
    }
    clear(scratch.dk, count * kV * padded_);
    clear(scratch.dv, count * kV * padded_);
    clear(scratch.dfar, 2 * count * kV);
    clear(scratch.dmean, padded_);
    return pack_keys<FloatWord>(p_, index_, tables, s, k, scratch.key_panels, count, scratch.key_columns, scratch.far);
  }

  // A query that got the mean of v hands its gradient to every key alike.
  void empty_row(const Sample& s, int64_t h, int64_t row, Scratch& scratch) const {
    float dout[kMaxHeadDim];
    read_row(head_of(p_, p_.dout, s, h, p_.dtype), row, head_dim_, head_dim_, dout);
    for (int d = 0; d < head_dim_; d++) scratch.dmean[d] += dout[d] / (float)s.nk;
    if (p_.dq.data) std::memset(head_of(p_, p_.dq, s, h, kFloat32).row(row), 0, (size_t)head_dim_ * sizeof(float));
  }

  void padding_rows(const Sample& s, int64_t h, Scratch& scratch) const {
    if (!p_.query_mask) return;
    const uint8_t* mask = p_.query_mask + s.index * p_.query_mask_stride_b;
    for (int64_t row = 0; row < s.nq; row++)
      if (!mask[row]) empty_row(s, h, row, scratch);
  }

  // Pack queries and dout, and each row's lse and out . dout; rows without probabilities are zero.
  void start_block(const Sample& s, int64_t h, const BlockRows& rows, Scratch& scratch) const {
    const Rows q = head_of(p_, p_.q, s, h, p_.dtype), out = head_of(p_, p_.out, s, h, p_.dtype);
    const Rows dout = head_of(p_, p_.dout, s, h, p_.dtype);
    float output[kMaxHeadDim];
    const float* lse = statistics_of(p_, p_.lse, s, h);
    const float* dlse = statistics_of(p_, p_.dlse, s, h);
    for (int r = 0; r < rows.count * kV; r++) {
      const RowPanel& panel = rows.panels[r / kV];
      const int lane = r % kV;
      const int64_t row = panel.row + lane;
      const bool active = lane < panel.count && (panel.active >> lane & 1);
      float *query = scratch.queries + r * padded_, *gradient = scratch.douts + r * padded_;
      scratch.shift[r] = INFINITY;
      scratch.factor[r] = 1.0f;
      scratch.out_dot_dout[r] = scratch.dlse[r] = 0.0f;
      if (!active || lse[row] == -INFINITY) {
        clear(query, padded_);
        clear(gradient, padded_);
        if (active) empty_row(s, h, row, scratch);
        continue;
      }
      read_row(q, row, head_dim_, padded_, query);
      read_row(dout, row, head_dim_, padded_, gradient);
      read_row(out, row, head_dim_, padded_, output);
      vf dot = zero();
      for (int d = 0; d < padded_; d += kV) dot = fma(load(output + d), load(gradient + d), dot);
      scratch.out_dot_dout[r] = reduce_add(dot);
      scratch.dlse[r] = dlse ? dlse[row] : 0.0f;
      scratch.shift[r] = (float)((double)lse[row] / p_.scale);
    }
    const int count = rows.count * kV;
    clear(scratch.dq, count * padded_);
    clear(scratch.row_far, 2 * count * kV);
  }

  void row_block(const Sample& s, int64_t h, const HeadKeys& keys, const PackedTables<FloatWord>& tables,
                 const BlockRows& rows, Scratch& scratch) const {
    start_block(s, h, rows, scratch);
    const uint8_t* pair = p_.pair_mask;
    if (pair) pair += s.index * p_.pair_mask_stride_b + h * p_.pair_mask_stride_h;
    const Score score{p_, index_, tables, keys, rows, pair, scratch.c2p, scratch.p2c, head_dim_, padded_,
                      &scratch.next_head};
    score.start_rows();
    const Score::Window window = block_window(score);
    if (tables.pos_key)
      for (int r = 0; r < rows.count * kV; r++)
        clear(scratch.dc2p + r * score.c2p_stride() + window.first, window.stop - window.first + kV);
    for (int64_t k = 0; k < keys.count; k += kBlockKeys / kV) {
      const int panels = (int)std::min<int64_t>(kBlockKeys / kV, keys.count - k);
      if (!score.any_allowed(k, panels)) continue;
      score.scores(k, panels, scratch.scores);
      gemm<FloatWord>(rows.count * kV, panels, head_dim_, {scratch.douts, padded_, 1},
                      {scratch.value_columns + k * head_dim_ * kV, (ptrdiff_t)head_dim_ * kV, kV}, scratch.dscores,
                      kBlockKeys, false);
      if (panels == keys.count) refine_rows(s, h, rows, keys, scratch);
      score_gradients(s, h, rows, keys, k, panels, scratch);
      token_gradients(rows.count * kV, k, panels, scratch);
      if (tables.pos_key || tables.pos_query)
        for (int i = 0; i < panels; i++)
          if (keys.panels[k + i].has_position) band_gradients(score, k + i, scratch.dscores + i * kV, h, scratch);
    }
    if (window.stop > window.first) finish_c2p(score, window, h, scratch);
    if (p_.dq.data) store_dq(s, h, rows, scratch);
  }

  // Columns of pos_key that any row of the block needs.
  static Score::Window block_window(const Score& score) {
    if (!score.tables.pos_key || !score.keys.count) return {0, 0};
    const auto last = score.c2p_window(0), first = score.c2p_window(score.rows.count - 1);  // later rows: lower columns
    return {std::min(first.first, last.first), std::max(first.stop, last.stop)};
  }

  // Where one block holds all keys of a row, maximum and sums are taken from what is at hand, as the forward did: `out`
  // may be rounded to 16 bits, and lse is a rounded sum. A row with all its weight on one key then gets exactly 0.
  void refine_rows(const Sample& s, int64_t h, const BlockRows& rows, const HeadKeys& keys, Scratch& scratch) const {
    const uint64_t stream = (uint64_t)(s.index * p_.heads + h);
    vf sums[kV], products[kV];
    for (int r = 0; r < rows.count; r++) {
      for (int lane = 0; lane < kV; lane++) {
        sums[lane] = products[lane] = zero();
        float& shift = scratch.shift[r * kV + lane];
        if (shift < INFINITY) shift = row_maximum(scratch.scores + (r * kV + lane) * kBlockKeys, (int)keys.count * kV);
      }
      for (int i = 0; i < keys.count; i++) {
        const int64_t key = keys.panels[i].key;
        if (dropout_.on()) draw_tile(dropout_, stream, rows.panels[r].row, key, scratch.draws);
        for (int lane = 0; lane < kV; lane++) {
          const int at = (r * kV + lane) * kBlockKeys + i * kV;
          const vf p = exponential(scratch, r * kV + lane, at);
          vf dp = load(scratch.dscores + at);
          if (dropout_.on()) dp = dp * keep_at(scratch, lane, key);
          sums[lane] = sums[lane] + p;
          products[lane] = fma(p, dp, products[lane]);
        }
      }
      for (int lane = 0; lane < kV; lane++) {
        const float sum = reduce_add(sums[lane]);
        if (sum == 0.0f) continue;  // a row without probabilities
        scratch.factor[r * kV + lane] = 1.0f / sum;
        scratch.out_dot_dout[r * kV + lane] = reduce_add(products[lane]) / sum;
      }
    }
  }

  vf exponential(const Scratch& scratch, int row, int at) const {
    return exp2_nonpositive((load(scratch.scores + at) - set1(scratch.shift[row])) * set1(scale_log2_));
  }

  vf keep_at(const Scratch& scratch, int lane, int64_t key) const {
    return keep_factor(scratch.draws + lane * kDrawsPerRow + (key & 7), dropout_.threshold, dropout_.scale);
  }

  // scores -> probabilities (after dropout), dscores: dout . v -> ds.
  void score_gradients(const Sample& s, int64_t h, const BlockRows& rows, const HeadKeys& keys, int64_t first,
                       int panels, Scratch& scratch) const {
    const vf scale = set1((float)p_.scale);
    const uint64_t stream = (uint64_t)(s.index * p_.heads + h);
    for (int r = 0; r < rows.count; r++)
      for (int i = 0; i < panels; i++) {
        const int64_t key = keys.panels[first + i].key;
        if (dropout_.on()) draw_tile(dropout_, stream, rows.panels[r].row, key, scratch.draws);
        for (int lane = 0; lane < kV; lane++) {
          const int row = r * kV + lane;
          float* score = scratch.scores + row * kBlockKeys + i * kV;
          float* dscore = scratch.dscores + row * kBlockKeys + i * kV;
          const vf p = exponential(scratch, row, row * kBlockKeys + i * kV) * set1(scratch.factor[row]);
          vf kept = p, dp = load(dscore);
          if (dropout_.on()) {
            const vf keep = keep_at(scratch, lane, key);
            kept = kept * keep;
            dp = dp * keep;
          }
          store(score, kept);
          store(dscore, p * (dp - set1(scratch.out_dot_dout[row] - scratch.dlse[row])) * scale);
        }
      }
  }

  // dq, dk, dv through the content term.
  void token_gradients(int count, int64_t first, int panels, Scratch& scratch) const {
    const int keys = panels * kV, vectors = padded_ / kV;
    const RowSource transposed{scratch.dscores, 1, kBlockKeys};
    if (p_.dv.data)
      gemm<FloatWord>(keys, vectors, count, {scratch.scores, 1, kBlockKeys}, rows_of(scratch.douts),
                      scratch.dv + first * kV * padded_, padded_, true);
    if (p_.dk.data)
      gemm<FloatWord>(keys, vectors, count, transposed, rows_of(scratch.queries), scratch.dk + first * kV * padded_,
                      padded_, true);
    if (p_.dq.data)
      gemm<FloatWord>(count, vectors, keys, {scratch.dscores, kBlockKeys, 1},
                      rows_of(scratch.key_rows + first * kV * padded_), scratch.dq, padded_, true);
  }

  // Collect ds of key panel k in the bands, then close the panel's p2c band.
  void band_gradients(const Score& score, int64_t k, const float* ds, int64_t h, Scratch& scratch) const {
    const int64_t stride = score.c2p_stride();
    Score::Window w{0, 0};
    if (score.tables.pos_query) w = score.p2c_window(k);
    const int64_t band = w.stop - w.first + kV;
    if (w.stop > w.first) clear(scratch.dp2c, kV * band);
    for (int r = 0; r < score.rows.count; r++) {
      const int64_t x = score.rows.panels[r].row - score.keys.panels[k].position;
      vf tile[kV];
      DK_UNROLL
      for (int lane = 0; lane < kV; lane++) tile[lane] = load(ds + (r * kV + lane) * kBlockKeys);
      const auto zone = score.zone_of(x, true);
      if (zone == Score::kLow || zone == Score::kHigh) {
        collect_far(score, zone == Score::kHigh, r, k, tile, scratch);
        continue;
      }
      if (score.tables.pos_key)
        for (int lane = 0; lane < kV; lane++)
          collect(zone, tile[lane], index_.key_slots_at(-x - lane), scratch.dc2p + (r * kV + lane) * stride);
      if (!score.tables.pos_query) continue;
      transpose(tile);
      for (int c = 0; c < kV; c++)
        collect(zone, tile[c], index_.query_slots_at(x - c), scratch.dp2c + c * band - w.first);
    }
    if (w.stop > w.first) finish_p2c(k, w, h, scratch);
  }

  // band[slots[c]] += values[c].
  DK_INLINE void collect(Score::Zone zone, vf values, const int32_t* slots, float* band) {
    if (zone != Score::kAny) {
      const vf sums = zone == Score::kLinear ? values : run_sums(values, slots);
      store(band + slots[0], load(band + slots[0]) + sums);
      return;
    }
    float lanes[kV];
    store(lanes, values);
    for (int c = 0; c < kV; c++) band[slots[c]] += lanes[c];
  }

  static void collect_far(const Score& score, bool high, int r, int64_t k, const vf* tile, Scratch& scratch) {
    vf sum = zero();
    for (int lane = 0; lane < kV; lane++) {
      sum = sum + tile[lane];
      float* row = scratch.row_far + (2 * (r * kV + lane) + high) * kV;
      store(row, load(row) + tile[lane]);
    }
    float* far = scratch.dfar + ((high ? score.keys.count : 0) + k) * kV;
    store(far, load(far) + sum);
  }

  void finish_p2c(int64_t k, Score::Window w, int64_t h, Scratch& scratch) const {
    const int64_t width = w.stop - w.first, band = width + kV;
    const float* table = tables_.pos_query + (h * index_.columns + w.first) * padded_;
    if (p_.dk.data)
      for (int64_t c = 0; c < width; c += kBandWords)
        gemm<FloatWord>(kV, padded_ / kV, (int)std::min<int64_t>(kBandWords, width - c), {scratch.dp2c + c, band, 1},
                        rows_of(table + c * padded_), scratch.dk + k * kV * padded_, padded_, true);
    if (p_.dpos_query)
      gemm<FloatWord>((int)width, padded_ / kV, kV, {scratch.dp2c, 1, band},
                      rows_of(scratch.key_rows + k * kV * padded_), scratch.dpos_query + w.first * padded_, padded_,
                      true);
  }

  void finish_c2p(const Score& score, Score::Window w, int64_t h, Scratch& scratch) const {
    const int64_t stride = score.c2p_stride(), width = w.stop - w.first;
    const int count = score.rows.count * kV;
    for (int high = 0; high < 2; high++) {
      const int64_t slot = index_.key_slot(high ? -index_.reach : index_.reach);
      if (slot < w.first || slot >= w.stop) continue;  // no pair of the block is that far apart
      for (int r = 0; r < count; r++)
        scratch.dc2p[r * stride + slot] += reduce_add(load(scratch.row_far + (2 * r + high) * kV));
    }
    const float* table = tables_.pos_key + (h * index_.columns + w.first) * padded_;
    if (p_.dq.data)
      for (int r = 0; r < score.rows.count; r++) {
        const Score::Window row = score.c2p_window(r);
        for (int64_t c = row.first; c < row.stop; c += kBandWords)
          gemm<FloatWord>(kV, padded_ / kV, (int)std::min<int64_t>(kBandWords, row.stop - c),
                          {scratch.dc2p + r * kV * stride + c, stride, 1}, rows_of(table + (c - w.first) * padded_),
                          scratch.dq + r * kV * padded_, padded_, true);
      }
    if (p_.dpos_key)
      gemm<FloatWord>((int)width, padded_ / kV, count, {scratch.dc2p + w.first, 1, stride}, rows_of(scratch.queries),
                      scratch.dpos_key + w.first * padded_, padded_, true);
  }

  // The saturated p2c terms: every key has one sum for each end of the table.
  void finish_far(int64_t h, const HeadKeys& keys, Scratch& scratch) const {
    if (!p_.has_pos_query) return;
    for (int high = 0; high < 2; high++) {
      const int64_t slot = index_.query_slot(high ? index_.reach : -index_.reach);
      const float* table = tables_.pos_query + (h * index_.columns + slot) * padded_;
      float* dtable = scratch.dpos_query + slot * padded_;
      for (int64_t j = 0; j < keys.count * kV; j++) {
        const vf sum = set1(scratch.dfar[high * keys.count * kV + j]);
        for (int d = 0; d < padded_; d += kV) {
          float* dk = scratch.dk + j * padded_ + d;
          store(dk, fma(sum, load(table + d), load(dk)));
          store(dtable + d, fma(sum, load(scratch.key_rows + j * padded_ + d), load(dtable + d)));
        }
      }
    }
  }

  void store_dq(const Sample& s, int64_t h, const BlockRows& rows, const Scratch& scratch) const {
    const Rows dq = head_of(p_, p_.dq, s, h, kFloat32);
    for (int r = 0; r < rows.count * kV; r++) {
      const RowPanel& panel = rows.panels[r / kV];
      const int lane = r % kV;
      if (lane < panel.count && (panel.active >> lane & 1))
        write_row(scratch.dq + r * padded_, head_dim_, dq, panel.row + lane);
    }
  }

  // Add dk and dv of one sample to the outputs; the first task of a sample writes instead.
  void add_key_gradients(const Sample& s, int64_t h, const HeadKeys& keys, bool overwrite,
                         const Scratch& scratch) const {
    if (p_.dk.data) add_keys(s, head_of(p_, p_.dk, s, h, kFloat32), keys, scratch.dk, nullptr, overwrite);
    if (p_.dv.data) add_keys(s, head_of(p_, p_.dv, s, h, kFloat32), keys, scratch.dv, scratch.dmean, overwrite);
  }

  // Every key gets `every` (or nothing), the keys of the panels their own sums as well.
  void add_keys(const Sample& s, const Rows& to, const HeadKeys& keys, const float* sums, const float* every,
                bool overwrite) const {
    float row[kMaxHeadDim];
    int64_t panel = 0;
    for (int64_t j = 0; j < s.nk; j++) {
      while (panel < keys.count && keys.panels[panel].key + keys.panels[panel].count <= j) panel++;
      const int64_t lane = panel < keys.count ? j - keys.panels[panel].key : -1;
      const bool summed = lane >= 0 && (keys.panels[panel].allowed >> lane & 1);
      if (overwrite) clear(row, padded_);
      else read_row(to, j, head_dim_, padded_, row);
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
  const int head_dim_, padded_;
  const float scale_log2_;
  const Dropout dropout_;
  const int64_t chunks_;   // tasks per sample, where a sample is long
  const int64_t samples_;  // samples per task, where they are short
  Turnstile turnstile_;
  TableRows tables_;
};

}  // namespace
