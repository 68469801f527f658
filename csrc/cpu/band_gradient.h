// The sums over distances, dpos_key and dpos_query, and what the position terms add to dq and dk. ds is collected in
// the same bands that the forward reads (tile by tile, along the diagonals); one product per band then serves the
// token's gradient and one the table's. Only plain rows of tables are read, so windows are cut closer than for scores.
#pragma once
#include "parallel.h"
#include "score.h"
#include "weights.h"

namespace {

constexpr int kBandWords = 128;  // summed words per step: that slice of a table stays in L1
// Rows summed at once for dpos_key: more need more columns, fewer read and write the table's sums more often.
constexpr int kTableRows = 32;

// One position table of one head. Rows are in the order of its slots: those of pos_key are reversed.
struct TableGradient {
  const float* rows;  // as words that pair neighbouring slots, [slot / per word][padded]
  float* sums;        // [slot][padded], or null if not wanted
};

template <class Word>
class BandGradient {
 public:
  using Score = ScoreBlock<Word>;
  using Window = typename Score::Window;

  // Scratch of one task.
  struct Room {
    float *dc2p, *dp2c, *row_far, *key_far, *along, *across, *far_along, *far_across, *far_rows;
    void take(Arena& a, const AttentionParams& p, const SlotIndex& index, int rows, int64_t keys, int padded) {
      const int64_t stride = band_stride(index);
      dc2p = a.take<float>(p.has_pos_key ? rows * stride + kV : 0);
      dp2c = a.take<float>(p.has_pos_query ? kV * stride + kV : 0);
      row_far = a.take<float>(2 * rows * kV);
      key_far = a.take<float>(2 * keys);
      for (float** copy : {&along, &across})
        *copy = a.take<float>(Weights<Word>::floats(kTableRows, index.columns + kV));
      for (float** copy : {&far_along, &far_across}) *copy = a.take<float>(Weights<Word>::floats(2, keys));
      far_rows = a.take<float>(2 * padded);
    }
  };

  // `key_rows` are the head's keys as words that pair neighbouring keys; `dk` is null if not wanted.
  BandGradient(const SlotIndex& index, int padded, const TableGradient& pos_key, const TableGradient& pos_query,
               const float* key_rows, float* dk, const Room& room)
      : index_(index), vectors_(padded / kV), padded_(padded), pos_key_(pos_key), pos_query_(pos_query),
        key_rows_(key_rows), dk_(dk), room_(room) {}

  void start_head(int64_t keys) { clear(room_.key_far, 2 * keys); }

  // Forget the row block before; `dq` is null if not wanted.
  void start_rows(const Score& score, float* dq) {
    dq_ = dq;
    window_ = {0, 0};
    if (!wants_c2p()) return;
    window_ = c2p_window(score, 0, score.rows.count);
    for (int r = 0; r < score.rows.count * kV; r++)
      clear(dc2p() + r * stride() + window_.first, window_.stop - window_.first + kV);
    clear(room_.row_far, 2 * score.rows.count * kV * kV);
  }

  // Collect ds[row][kBlockKeys] of key panel k in the bands, then close the panel's p2c band.
  void add_panel(const Score& score, int64_t k, const float* ds) {
    Window w{0, 0};
    if (wants_p2c()) w = score.p2c_window(k, kMicroRows);
    if (w.stop > w.first)
      for (int c = 0; c < kV; c++) clear(dp2c() + c * stride() + w.first, w.stop - w.first + kV);
    for (int r = 0; r < score.rows.count; r++) {
      const int64_t x = score.rows.panels[r].row - score.keys.panels[k].position;
      vf tile[kV];
      DK_UNROLL
      for (int lane = 0; lane < kV; lane++) tile[lane] = load(ds + (r * kV + lane) * kBlockKeys);
      const auto zone = score.zone_of(x, true);
      if (zone == Score::kLow || zone == Score::kHigh) {
        collect_far(zone == Score::kHigh, r, k, score.keys.count, tile);
        continue;
      }
      if (wants_c2p())
        for (int lane = 0; lane < kV; lane++)
          collect(zone, tile[lane], index_.key_slots_at(-x - lane), dc2p() + (r * kV + lane) * stride());
      if (!wants_p2c()) continue;
      transpose(tile);
      for (int c = 0; c < kV; c++) collect(zone, tile[c], index_.query_slots_at(x - c), dp2c() + c * stride());
    }
    if (w.stop == w.first) return;
    const Weights<Word> weights = weights_of(dp2c(), kV, w);
    if (dk_) add_to_tokens(weights, 0, w.first, w, pos_query_, dk_ + k * kV * padded_);
    add_to_table(weights, kV, w, key_rows_ + k * kV / Word::kPerWord * padded_, pos_query_);
  }

  // Close the c2p bands of the row block; query_rows are its queries as words that pair neighbouring rows.
  void finish_rows(const Score& score, const float* query_rows) {
    if (window_.stop == window_.first) return;
    for (int high = 0; high < 2; high++) {
      const int64_t slot = index_.key_slot(high ? -index_.reach : index_.reach);
      if (slot < window_.first || slot >= window_.stop) continue;  // no pair of the block is that far apart
      for (int r = 0; r < score.rows.count * kV; r++)
        dc2p()[r * stride() + slot] += reduce_add(load(room_.row_far + (2 * r + high) * kV));
    }
    for (int r = 0; r < score.rows.count; r += kTableRows / kV) {
      const int panels = std::min(kTableRows / kV, score.rows.count - r);
      const Window w = c2p_window(score, r, panels);
      const Weights<Word> weights = weights_of(dc2p() + r * kV * stride(), panels * kV, w);
      for (int i = 0; dq_ && i < panels; i++)
        add_to_tokens(weights, i * kV, w.first, score.c2p_window(r + i, kMicroRows), pos_key_,
                      dq_ + (r + i) * kV * padded_);
      add_to_table(weights, panels * kV, w, query_rows + r * kV / Word::kPerWord * padded_, pos_key_);
    }
  }

  // The saturated p2c terms: every key has one sum for each end of the table, whose rows `pos_query` holds.
  void finish_head(const Sample& s, int64_t keys, const Rows& pos_query, int head_dim) {
    if (!wants_p2c() || !keys || (s.nq <= index_.high_start && -s.nk >= index_.low_end)) return;
    const int64_t low = index_.query_slot(-index_.reach), high = index_.query_slot(index_.reach);
    const Weights<Word> weights(room_.key_far, keys, room_.far_along, room_.far_across, keys);
    weights.round(0, 2, 0, (int)keys);
    // The ends may be one slot in a tiny table: two rows are summed one after the other, so that works too.
    if (pos_query_.sums)
      gemm<Word>(2, vectors_, (int)(keys / Word::kPerWord), weights.over_columns(0, 0), rows_of(key_rows_),
                 pos_query_.sums + low * padded_, (high - low) * padded_, true);
    if (!dk_) return;
    pack_two(Word(), pos_query, low, high, head_dim, padded_, room_.far_rows);
    gemm<Word>((int)keys, vectors_, 2 / Word::kPerWord, weights.over_rows(0, 0), rows_of(room_.far_rows), dk_, padded_,
               true);
  }

 private:
  static int64_t band_stride(const SlotIndex& index) { return index.columns + kV + 1; }
  static void clear(float* values, int64_t count) { std::memset(values, 0, (size_t)count * sizeof(float)); }

  // Neighbouring rows of a tile are one slot apart where the index is linear. A stride of whole vectors and 1 makes up
  // for that, and the start for where slots begin: their vectors are then aligned.
  int64_t stride() const { return band_stride(index_); }
  float* dc2p() const { return room_.dc2p + (kV - index_.key_slot(0) % kV) % kV; }
  float* dp2c() const { return room_.dp2c + (kV - index_.query_slot(0) % kV) % kV; }

  bool wants_c2p() const { return pos_key_.rows && (dq_ || pos_key_.sums); }
  bool wants_p2c() const { return pos_query_.rows && (dk_ || pos_query_.sums); }
  ColumnSource rows_of(const float* rows) const { return {rows, kV, padded_}; }

  // band[slots[c]] += values[c].
  DK_INLINE void collect(typename Score::Zone zone, vf values, const int32_t* slots, float* band) {
    if (zone != Score::kAny) {
      const vf sums = zone == Score::kLinear ? values : run_sums(values, slots);
      store(band + slots[0], load(band + slots[0]) + sums);
      return;
    }
    float lanes[kV];
    store(lanes, values);
    for (int c = 0; c < kV; c++) band[slots[c]] += lanes[c];
  }

  void collect_far(bool high, int r, int64_t k, int64_t panels, const vf* tile) const {
    vf sum = zero();
    for (int lane = 0; lane < kV; lane++) {
      sum = sum + tile[lane];
      float* row = room_.row_far + (2 * (r * kV + lane) + high) * kV;
      store(row, load(row) + tile[lane]);
    }
    float* far = room_.key_far + ((high ? panels : 0) + k) * kV;
    store(far, load(far) + sum);
  }

  // Columns of pos_key that any of `count` row panels needs; later rows need lower ones.
  static Window c2p_window(const Score& score, int r, int count) {
    const Window high = score.c2p_window(r, kMicroRows), low = score.c2p_window(r + count - 1, kMicroRows);
    return {std::min(low.first, high.first), std::max(low.stop, high.stop)};
  }

  // Columns `w` of a band [count][stride()], as operand.
  Weights<Word> weights_of(const float* band, int count, Window w) const {
    const Weights<Word> weights(band + w.first, stride(), room_.along, room_.across, index_.columns + kV);
    weights.round(0, count, 0, (int)(w.stop - w.first));
    return weights;
  }

  // dx += band . table for the kV tokens from `row`; `weights` start at column `first`.
  void add_to_tokens(const Weights<Word>& weights, int row, int64_t first, Window w, const TableGradient& table,
                     float* dx) const {
    constexpr int kStep = kBandWords * Word::kPerWord;
    for (int64_t c = w.first; c < w.stop; c += kStep)
      gemm<Word>(kV, vectors_, (int)std::min<int64_t>(kStep, w.stop - c) / Word::kPerWord,
                 weights.over_columns(row, c - first), rows_of(table.rows + c / Word::kPerWord * padded_), dx, padded_,
                 true);
  }

  // dtable += band^T . x.
  void add_to_table(const Weights<Word>& weights, int count, Window w, const float* x_rows,
                    const TableGradient& table) const {
    if (!table.sums) return;
    gemm<Word>((int)(w.stop - w.first), vectors_, count / Word::kPerWord, weights.over_rows(0, 0), rows_of(x_rows),
               table.sums + w.first * padded_, padded_, true);
  }

  const SlotIndex& index_;
  const int vectors_, padded_;
  const TableGradient pos_key_, pos_query_;
  const float* key_rows_;
  float* dk_;
  const Room& room_;
  float* dq_ = nullptr;
  Window window_{0, 0};  // columns of pos_key that any row of the block needs
};

}  // namespace
