// How a score is formed: q.k + q.pos_key[delta(i-j)] + k.pos_query[delta(i-j)], masked. Forward and backward both call
// ScoreBlock::scores, so that they cannot drift apart. Scores stay unscaled until a maximum or lse is subtracted:
// scaling first would round once more, at the magnitude of the score instead of the difference.
//
// The position terms are products with a *band* of table columns, never with the whole table per pair: one band per
// row panel for c2p (all keys, once per row block), one per key panel for p2c (the rows of the block). The columns of a
// band are its *window*. A tile of kV x kV pairs then reads the band along its diagonals,
//     bias[r][c] = c2p[r][key_slot(c - r - x)] + p2c[c][query_slot(x + r - c)],   x = distance of its first pair,
// contiguous loads for c2p, and for p2c contiguous loads that are transposed in registers. See docs/math.md.
#pragma once
#include <algorithm>
#include <cmath>

#include "tables.h"

namespace {

constexpr int kBlockKeys = 192;  // keys per block: 12 AVX-512 panels = 4 full micro-kernel steps; the block stays in L2
constexpr double kLog2E = 1.4426950408889634;

// The keys of one head, packed.
struct HeadKeys {
  const KeyPanel* panels;
  int64_t count;
  const float* columns;    // [panel][words][kV]
  const float* far_low;    // k . pos_query at the saturated low end, [panel][kV]
  const float* far_high;
};

// The queries of one row block, packed.
struct BlockRows {
  const RowPanel* panels;
  int count;
  const float* words;      // [count * kV][padded words]
};

template <class Word>
struct ScoreBlock {
  const AttentionParams& params;
  const SlotIndex& index;
  const PackedTables<Word> tables;
  const HeadKeys& keys;
  const BlockRows& rows;
  const uint8_t* pair_mask;  // of this head, or null
  float* c2p;                // [count * kV][c2p_stride()]
  float* p2c;                // [kV][p2c_stride], for the current key panel
  int words, padded;
  NextHead* next_head;       // stepped with every tile

  static int64_t c2p_stride(const SlotIndex& index) { return index.columns + kV; }
  int64_t c2p_stride() const { return c2p_stride(index); }

  struct Window {  // columns [first, stop) of a table, multiples of kV
    int64_t first, stop;
  };
  // Columns that distances low ... high need.
  Window query_window(int64_t low, int64_t high) const {
    if (!index.smooth) return {0, index.columns};
    return {index.query_slot(low) / kV * kV, round_to_vector(index.query_slot(high) + 1)};
  }
  Window key_window(int64_t low, int64_t high) const {
    if (!index.smooth) return {0, index.columns};
    return {index.key_slot(low) / kV * kV, round_to_vector(index.key_slot(high) + 1)};
  }
  ColumnSource table_columns(const float* table, int64_t first) const {
    return {table + first * words, (ptrdiff_t)words * kV, kV};
  }

  // Columns of pos_key that row panel r needs for any key.
  Window c2p_window(int r) const {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (const int64_t k : {(int64_t)0, keys.count - 1}) {
      low = std::min(low, keys.panels[k].position);
      high = std::max(high, keys.panels[k].position + kV - 1);
    }
    const int64_t row = rows.panels[r].row;
    return key_window(low - (row + kV - 1), high - row);
  }
  // Columns of pos_query that key panel k needs for any row of the block; empty if every tile is saturated.
  Window p2c_window(int64_t k) const {
    const int64_t position = keys.panels[k].position;
    const int64_t low = rows.panels[0].row - position - (kV - 1);
    const int64_t high = rows.panels[rows.count - 1].row - position + (kV - 1);
    if (high <= index.low_end || low >= index.high_start) return {0, 0};
    return query_window(low, high);
  }

  // c2p = rows . pos_key for every row of the block. Call once per block.
  void start_rows() const {
    if (!tables.pos_key || !keys.count) return;
    for (int r = 0; r < rows.count; r++) {
      const Window w = c2p_window(r);
      gemm<Word>(kV, (int)((w.stop - w.first) / kV), words, {rows.words + r * kV * padded, padded, 1},
                 table_columns(tables.pos_key, w.first), c2p + r * kV * c2p_stride() + w.first, c2p_stride(), false);
    }
  }

  // p2c = keys of panel k . pos_query.
  void start_panel(int64_t k, Window w) const {
    if (w.stop == w.first) return;
    gemm<Word>(kV, (int)((w.stop - w.first) / kV), words, {keys.columns + k * words * kV, 1, kV},
               table_columns(tables.pos_query, w.first), p2c, w.stop - w.first + kV, false);
  }

  // What the index does over the distances of a tile.
  enum Zone {
    kNone,    // no bias: prefix keys, or no position terms
    kLow,     // saturated at the low end: one slot
    kHigh,    // saturated at the high end
    kLinear,  // neighbours are exactly one slot apart
    kSmooth,  // neighbours are 0 or 1 slot apart
    kAny,     // the index jumps or falls somewhere
  };
  Zone zone_of(int64_t x, bool has_position) const {  // x = distance of the tile's first query and key
    if (!has_position || !(tables.pos_key || tables.pos_query)) return kNone;
    if (x + kV - 1 <= index.low_end) return kLow;
    if (x - (kV - 1) >= index.high_start) return kHigh;
    if (!index.smooth) return kAny;
    return index.query_slot(x + kV - 1) - index.query_slot(x - (kV - 1)) == 2 * kV - 2 ? kLinear : kSmooth;
  }

  // Turn one tile of products q.k into scores. One branch per zone, so that the bias never leaves the registers.
  void score_tile(int64_t k, int r, Window w, float* products) const {
    const RowPanel& row = rows.panels[r];
    const KeyPanel& key = keys.panels[k];
    const float* c2p_rows = c2p + r * kV * c2p_stride();
    const int64_t x = row.row - key.position;
    const Zone zone = zone_of(x, key.has_position);
    vf bias[kV];
    if (zone == kLow || zone == kHigh) {
      far_bias_tile(zone == kHigh, k, c2p_rows, bias);
      finish_tile(row, key, bias, products);
    } else if (zone == kLinear) {
      near_bias_tile<true>(x, w, c2p_rows, bias);
      finish_tile(row, key, bias, products);
    } else if (zone == kSmooth) {
      near_bias_tile<false>(x, w, c2p_rows, bias);
      finish_tile(row, key, bias, products);
    } else {
      if (zone == kAny) any_bias_tile(x, w, c2p_rows, bias);
      else
        for (int c = 0; c < kV; c++) bias[c] = zero();
      finish_tile(row, key, bias, products);
    }
  }

  // Both terms of a saturated tile are one number per query and one per key.
  DK_INLINE_MEMBER void far_bias_tile(bool high, int64_t k, const float* c2p_rows, vf* bias) const {
    const vf far = tables.pos_query ? load((high ? keys.far_high : keys.far_low) + k * kV) : zero();
    const float* c2p_far = c2p_rows + index.key_slot(high ? -index.reach : index.reach);
    const int64_t stride = c2p_stride();
    DK_UNROLL
    for (int r = 0; r < kV; r++) bias[r] = tables.pos_key ? far + set1(c2p_far[r * stride]) : far;
  }

  // Going down one row of the tile moves one slot back along a band, hence the stride less one in the linear zone.
  template <bool kLinearIndex>
  DK_INLINE_MEMBER void near_bias_tile(int64_t x, Window w, const float* c2p_rows, vf* bias) const {
    if (tables.pos_query) {
      const int64_t p2c_stride = w.stop - w.first + kV;
      const int32_t* slots = index.query_slots_at(x);
      const float* band = p2c + (slots[0] - w.first);
      DK_UNROLL
      for (int c = 0; c < kV; c++)
        bias[c] = kLinearIndex ? load(band + c * (p2c_stride - 1))
                               : lookup(p2c + c * p2c_stride + (slots[-c] - w.first), slots - c);
      transpose(bias);
    } else {
      for (int r = 0; r < kV; r++) bias[r] = zero();
    }
    if (tables.pos_key) {
      const int64_t stride = c2p_stride();
      const int32_t* slots = index.key_slots_at(-x);
      const float* band = c2p_rows + slots[0];
      DK_UNROLL
      for (int r = 0; r < kV; r++)
        bias[r] = bias[r] + (kLinearIndex ? load(band + r * (stride - 1))
                                          : lookup(c2p_rows + r * stride + slots[-r], slots - r));
    }
  }

  // Position terms through an index that jumps or falls.
  void any_bias_tile(int64_t x, Window w, const float* c2p_rows, vf* bias) const {
    const int64_t stride = c2p_stride(), p2c_stride = w.stop - w.first + kV;
    float values[kV];
    for (int r = 0; r < kV; r++) {
      for (int c = 0; c < kV; c++) {
        float sum = 0.0f;
        if (tables.pos_query) sum += p2c[c * p2c_stride + index.query_slot(x + r - c) - w.first];
        if (tables.pos_key) sum += c2p_rows[r * stride + index.key_slot(c - r - x)];
        values[c] = sum;
      }
      bias[r] = load(values);
    }
  }

  LaneBits pair_bits(const RowPanel& row, int r, const KeyPanel& key) const {
    if (r >= row.count) return 0;
    return bits_from_bytes(pair_mask + (row.row + r) * params.pair_mask_stride_q + key.key, key.count);
  }

  // Turn products[kV][.] of one tile into scores: add the bias, mask by selection.
  DK_INLINE_MEMBER void finish_tile(const RowPanel& row, const KeyPanel& key, const vf* bias, float* products) const {
    if (key.allowed == kAllLanes && !pair_mask) {
      DK_UNROLL
      for (int r = 0; r < kV; r++) store(products + r * kBlockKeys, load(products + r * kBlockKeys) + bias[r]);
      return;
    }
    const vf masked = set1(-INFINITY);
    for (int r = 0; r < kV; r++) {
      float* p = products + r * kBlockKeys;
      const LaneBits lanes = pair_mask ? key.allowed & pair_bits(row, r, key) : key.allowed;
      store(p, select(lanes, load(p) + bias[r], masked));
    }
  }

  // Unscaled scores[count * kV][kBlockKeys] of the block's rows with key panels [first, first + panels).
  void scores(int64_t first, int panels, float* scores) const {
    gemm<Word>(rows.count * kV, panels, words, {rows.words, padded, 1},
               {keys.columns + first * words * kV, (ptrdiff_t)words * kV, kV}, scores, kBlockKeys, false);
    for (int i = 0; i < panels; i++) {
      const KeyPanel& key = keys.panels[first + i];
      Window w{0, 0};
      if (tables.pos_query && key.has_position) {
        w = p2c_window(first + i);
        start_panel(first + i, w);
      }
      for (int r = 0; r < rows.count; r++) {
        next_head->step();
        score_tile(first + i, r, w, scores + r * kV * kBlockKeys + i * kV);
      }
    }
  }

  // Whether any pair of the block's rows with these key panels is allowed; only a pair mask can say no.
  bool any_allowed(int64_t first, int panels) const {
    if (!pair_mask) return true;
    for (int r = 0; r < rows.count; r++)
      for (int lane = 0; lane < rows.panels[r].count; lane++)
        for (int i = 0; i < panels; i++)
          if (pair_bits(rows.panels[r], lane, keys.panels[first + i]) & keys.panels[first + i].allowed) return true;
    return false;
  }
};

// Largest of `count` scores; NaN may be lost here, and shows in the sum instead.
DK_INLINE float row_maximum(const float* scores, int count) {
  vf maximum = load(scores);
  for (int c = kV; c < count; c += kV) maximum = max_keep_nan(maximum, load(scores + c));
  return reduce_max(maximum);
}

// Pack the keys of one head and compute their saturated p2c terms; `far` has room for 2 x panels x kV floats.
template <class Word>
static HeadKeys pack_keys(const AttentionParams& p, const SlotIndex& index, const PackedTables<Word>& tables,
                          const Sample& s, const Rows& k, const KeyPanel* panels, int64_t count, float* columns,
                          float* far) {
  const int words = words_of<Word>((int)p.head_dim);
  for (int64_t i = 0; i < count; i++)
    pack_panel<Word>(k, panels[i].key, panels[i].allowed, (int)p.head_dim, columns + i * words * kV);
  float *low = far, *high = far + count * kV;
  if (tables.pos_query && (s.nq > index.high_start || -s.nk < index.low_end)) {
    for (int end = 0; end < 2; end++) {
      const int64_t slot = index.query_slot(end ? index.reach : -index.reach);
      const float* column = tables.pos_query + slot / kV * kV * words + slot % kV;
      for (int64_t i = 0; i < count; i++)
        micro_kernel<Word, 1, 1>({column, 0, kV}, {columns + i * words * kV, 0, kV}, (end ? high : low) + i * kV, 0,
                                 words, false);
    }
  }
  return {panels, count, columns, low, high};
}

}  // namespace
