// The sums over distances, dpos_key and dpos_query, and what the position terms add to dq and dk. ds is collected in
// bands of table columns like those of the forward, along the diagonals of tiles; one product per band then serves the
// token's gradient and one the table's. Only plain rows of tables are read, so windows are cut closer than for scores.
// A c2p band has a row per query. A p2c band has a vector of keys per slot: rows of ds pass by with lanes delayed such
// that each vector holds one distance, and neighbouring distances of a slot are summed in a register.
#pragma once
#include "parallel.h"
#include "score.h"
#include "weights.h"

namespace {

constexpr int kBandWords = 128;  // summed words per step: that slice of a table stays in L1
// Rows summed at once for dpos_key: more need more columns, fewer read and write the table's sums more often.
constexpr int kTableRows = 32;

// Turns vectors [query][key] into vectors [distance][key]: lane c of what step r returns is lane c of the vector that
// step r - (kV - 1 - c) was given. Every step must be a constant, so that all of this stays in registers.
struct Diagonals {
  vf late[kV - 1];  // of each power of two s < kV, the last s vectors whose lanes lag by their index modulo s

  DK_INLINE_MEMBER Diagonals() {
    DK_UNROLL
    for (int i = 0; i < kV - 1; i++) late[i] = zero();
  }
  DK_INLINE_MEMBER vf step(vf x, int r) {
    DK_UNROLL
    for (int s = 1; s < kV; s *= 2) {
      const LaneBits lanes = kAllLanes / ((1u << s) + 1);  // those without bit s in their index
      vf& before = late[s - 1 + r % s];
      const vf moved = select(lanes, before, x);
      before = x;
      x = moved;
    }
    return x;
  }
};

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
  struct Scratch {
    float *dc2p, *dp2c, *row_far, *key_far, *far_rows;
    float *c2p_along, *c2p_across, *p2c_along, *p2c_across, *far_along, *far_across;
    void take(Arena& a, const AttentionParams& p, const SlotIndex& index, int rows, int64_t keys, int padded) {
      const int64_t stride = band_stride(index);
      dc2p = a.take<float>(p.has_pos_key ? rows * stride + kV : 0);
      dp2c = a.take<float>(p.has_pos_query ? kV * index.columns : 0);
      for (float** copy : {&p2c_along, &p2c_across})
        *copy = a.take<float>(Weights<Word>::floats(p.has_pos_query ? index.columns : 0, kV));
      row_far = a.take<float>(2 * rows * kV);
      key_far = a.take<float>(2 * keys);
      for (float** copy : {&c2p_along, &c2p_across})
        *copy = a.take<float>(Weights<Word>::floats(kTableRows, index.columns + kV));
      for (float** copy : {&far_along, &far_across}) *copy = a.take<float>(Weights<Word>::floats(2, keys));
      far_rows = a.take<float>(2 * padded);
    }
  };

  // `key_rows` are the head's keys as words that pair neighbouring keys; `dk` is null if not wanted.
  BandGradient(const SlotIndex& index, int padded, const TableGradient& pos_key, const TableGradient& pos_query,
               const float* key_rows, float* dk, const Scratch& scratch)
      : index_(index), vectors_(padded / kV), padded_(padded), pos_key_(pos_key), pos_query_(pos_query),
        key_rows_(key_rows), dk_(dk), scratch_(scratch) {}

  void start_head(int64_t keys) { clear(scratch_.key_far, 2 * keys); }

  // Forget the row block before; `dq` is null if not wanted.
  void start_rows(const Score& score, float* dq) {
    dq_ = dq;
    window_ = {0, 0};
    if (!wants_c2p()) return;
    window_ = c2p_window(score, 0, score.rows.count);
    for (int r = 0; r < score.rows.count * kV; r++)
      clear(dc2p() + r * stride() + window_.first, window_.stop - window_.first + kV);
    clear(scratch_.row_far, 2 * score.rows.count * kV * kV);
  }

  // Collect ds[row][kBlockKeys] of key panel k: in the c2p bands of the rows, and in a p2c band that is closed.
  void add_panel(const Score& score, int64_t k, const float* ds) {
    if (wants_c2p())
      for (int r = 0; r < score.rows.count; r++) add_to_rows(score, k, r, ds + r * kV * kBlockKeys);
    if (!wants_p2c()) return;
    const Window w = score.p2c_window(k, kMicroRows);
    if (w.stop == w.first) {
      add_to_far(score, k, ds);
      return;
    }
    fill_band(score, score.keys.panels[k], w, ds);
    const Weights<Word> weights(scratch_.dp2c, kV, scratch_.p2c_along, scratch_.p2c_across, kV);  // [slot][key]
    weights.round(0, (int)(w.stop - w.first), 0, kV);
    if (dk_) add_to_tokens(weights.over_rows(0, 0), w, pos_query_, dk_ + k * kV * padded_);
    add_to_table(weights.over_columns(0, 0), kV, w, key_rows_ + k * kV / Word::kPerWord * padded_, pos_query_);
  }

  // Close the c2p bands of the row block; query_rows are its queries as words that pair neighbouring rows.
  void finish_rows(const Score& score, const float* query_rows) {
    if (window_.stop == window_.first) return;
    for (int high = 0; high < 2; high++) {
      const int64_t slot = index_.key_slot(high ? -index_.reach : index_.reach);
      if (slot < window_.first || slot >= window_.stop) continue;  // no pair of the block is that far apart
      for (int r = 0; r < score.rows.count * kV; r++)
        dc2p()[r * stride() + slot] += reduce_add(load(scratch_.row_far + (2 * r + high) * kV));
    }
    for (int r = 0; r < score.rows.count; r += kTableRows / kV) {
      const int panels = std::min(kTableRows / kV, score.rows.count - r);
      const Window w = c2p_window(score, r, panels);
      const Weights<Word> weights(dc2p() + r * kV * stride() + w.first, stride(), scratch_.c2p_along,
                                  scratch_.c2p_across, index_.columns + kV);  // [query][slot]
      weights.round(0, panels * kV, 0, (int)(w.stop - w.first));
      for (int i = 0; dq_ && i < panels; i++) {
        const Window own = score.c2p_window(r + i, kMicroRows);
        add_to_tokens(weights.over_columns(i * kV, own.first - w.first), own, pos_key_, dq_ + (r + i) * kV * padded_);
      }
      add_to_table(weights.over_rows(0, 0), panels * kV, w, query_rows + r * kV / Word::kPerWord * padded_, pos_key_);
    }
  }

  // The saturated p2c terms: every key has one sum for each end of the table, whose rows `pos_query` holds.
  void finish_head(const Sample& s, int64_t keys, const Rows& pos_query, int head_dim) {
    if (!wants_p2c() || !keys || (s.nq <= index_.high_start && -s.nk >= index_.low_end)) return;
    const int64_t low = index_.query_slot(-index_.reach), high = index_.query_slot(index_.reach);
    const Weights<Word> weights(scratch_.key_far, keys, scratch_.far_along, scratch_.far_across, keys);
    weights.round(0, 2, 0, (int)keys);
    // The ends may be one slot in a tiny table: two rows are summed one after the other, so that works too.
    if (pos_query_.sums)
      gemm<Word>(2, vectors_, (int)(keys / Word::kPerWord), weights.over_columns(0, 0), rows_of(key_rows_),
                 pos_query_.sums + low * padded_, (high - low) * padded_, true);
    if (!dk_) return;
    pack_two(Word(), pos_query, low, high, head_dim, padded_, scratch_.far_rows);
    gemm<Word>((int)keys, vectors_, 2 / Word::kPerWord, weights.over_rows(0, 0), rows_of(scratch_.far_rows), dk_,
               padded_, true);
  }

 private:
  static int64_t band_stride(const SlotIndex& index) { return index.columns + kV + 1; }
  static void clear(float* values, int64_t count) { std::memset(values, 0, (size_t)count * sizeof(float)); }

  // Neighbouring rows of a tile are one slot apart where the index is linear. A stride of whole vectors and 1 makes up
  // for that, and the start for where slots begin: their vectors are then aligned.
  int64_t stride() const { return band_stride(index_); }
  float* dc2p() const { return scratch_.dc2p + (kV - index_.key_slot(0) % kV) % kV; }

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

  // c2p: one row panel, one key panel.
  void add_to_rows(const Score& score, int64_t k, int r, const float* ds) const {
    const int64_t x = score.rows.panels[r].row - score.keys.panels[k].position;
    const auto zone = score.zone_of(x, true);
    if (zone == Score::kLow || zone == Score::kHigh) {
      for (int lane = 0; lane < kV; lane++) {
        float* far = scratch_.row_far + (2 * (r * kV + lane) + (zone == Score::kHigh)) * kV;
        store(far, load(far) + load(ds + lane * kBlockKeys));
      }
      return;
    }
    for (int lane = 0; lane < kV; lane++)
      collect(zone, load(ds + lane * kBlockKeys), index_.key_slots_at(-x - lane), dc2p() + (r * kV + lane) * stride());
  }

  // p2c, where all rows of the block are beyond the same end of the table.
  void add_to_far(const Score& score, int64_t k, const float* ds) const {
    const bool high = score.rows.panels[0].row - score.keys.panels[k].position - (kV - 1) >= index_.high_start;
    float* far = scratch_.key_far + ((high ? score.keys.count : 0) + k) * kV;
    vf sum = load(far);
    for (int r = 0; r < score.rows.count * kV; r++) sum = sum + load(ds + r * kBlockKeys);
    store(far, sum);
  }

  // p2c: dp2c[slot - w.first][kV keys] = sum of ds over the distances of a slot.
  void fill_band(const Score& score, const KeyPanel& panel, Window w, const float* ds) const {
    const int count = score.rows.count;
    const int64_t low = score.rows.panels[0].row - panel.position - (kV - 1);
    const int64_t high = score.rows.panels[count - 1].row - panel.position + (kV - 1);
    const bool gaps = high - low + 2 != (count + 1) * kV || !index_.smooth;
    float* band = scratch_.dp2c - w.first * kV;
    const int64_t first = gaps ? w.stop : index_.query_slot(low), last = gaps ? w.stop : index_.query_slot(high);
    clear(band + w.first * kV, (first - w.first) * kV);  // what no distance of the block belongs to
    clear(band + last * kV, (w.stop - last) * kV);
    Run run{band, -1, zero(), index_.smooth};
    Diagonals diagonals;
    for (int r = 0; r < count; r++) {
      const int64_t x = score.rows.panels[r].row - panel.position - (kV - 1);
      const float* tile = ds + r * kV * kBlockKeys;
      DK_UNROLL
      for (int i = 0; i < kV; i++) run.add(index_.query_slot(x + i), diagonals.step(load(tile + i * kBlockKeys), i));
      if (r + 1 < count && score.rows.panels[r + 1].row == score.rows.panels[r].row + kV) continue;
      DK_UNROLL
      for (int i = 0; i < kV - 1; i++) run.add(index_.query_slot(x + kV + i), diagonals.step(zero(), i));
    }
  }

  // Sums neighbouring distances of one slot in a register; in the band where a slot may come again later.
  struct Run {
    float* band;
    int64_t slot;
    vf sum;
    bool smooth;
    DK_INLINE_MEMBER void add(int64_t next, vf x) {
      sum = x + (smooth ? select(next == slot ? kAllLanes : 0, sum, zero()) : load(band + next * kV));
      slot = next;
      store(band + slot * kV, sum);
    }
  };

  // Columns of pos_key that any of `count` row panels needs; later rows need lower ones.
  static Window c2p_window(const Score& score, int r, int count) {
    const Window high = score.c2p_window(r, kMicroRows), low = score.c2p_window(r + count - 1, kMicroRows);
    return {std::min(low.first, high.first), std::max(low.stop, high.stop)};
  }

  // dx[token] += sum over the slots of w of sums[token][slot] * table[slot], for kV tokens.
  void add_to_tokens(RowSource sums, Window w, const TableGradient& table, float* dx) const {
    const float* rows = table.rows + w.first / Word::kPerWord * padded_;
    const int words = (int)(w.stop - w.first) / Word::kPerWord;
    for (int i = 0; i < words; i += kBandWords)
      gemm<Word>(kV, vectors_, std::min(kBandWords, words - i), {sums.data + i * sums.step, sums.row, sums.step},
                 rows_of(rows + i * padded_), dx, padded_, true);
  }

  // dtable[slot] += sum over `count` tokens of sums[slot][token] * x[token], for the slots of w.
  void add_to_table(RowSource sums, int count, Window w, const float* x_rows, const TableGradient& table) const {
    if (table.sums)
      gemm<Word>((int)(w.stop - w.first), vectors_, count / Word::kPerWord, sums, rows_of(x_rows),
                 table.sums + w.first * padded_, padded_, true);
  }

  const SlotIndex& index_;
  const int vectors_, padded_;
  const TableGradient pos_key_, pos_query_;
  const float* key_rows_;
  float* dk_;
  const Scratch& scratch_;
  float* dq_ = nullptr;
  Window window_{0, 0};  // columns of pos_key that any row of the block needs
};

}  // namespace
