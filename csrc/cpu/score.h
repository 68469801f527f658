// How a score is formed: q.k + q.pos_key[delta(i-j)] + k.pos_query[delta(i-j)], masked. Forward and backward both call
// ScoreBlock::scores, so that they cannot drift apart. Scores stay unscaled until a maximum or lse is subtracted:
// scaling first would round once more, at the magnitude of the score instead of the difference. All but a power of two:
// score_factor is exact, and keeps products finite where the scaled score is.
//
// The position terms are products with a *band* of table columns, never with the whole table per pair: one band per
// row panel for c2p (all keys, once per row block), one per key panel for p2c (the rows of the block). The slots of a
// band are its *window*. A tile of kV x kV pairs then reads the bands along their diagonals,
//     bias[r][c] = c2p[r][key_slot(c - r - x)] + p2c[query_slot(x + r - c)][c],   x = distance of its first pair,
// contiguous loads for c2p; for p2c whole vectors, one per distance, sheared in registers. See docs/math.md.
#pragma once
#include <algorithm>
#include <cmath>

#include "tables.h"

namespace {

constexpr int kMostRows = 128;   // rows of a block, at most
constexpr int kBlockKeys = 192;  // keys per block: 12 AVX-512 panels = 4 full micro-kernel steps; the block stays in L2
constexpr int kBiasStride = kMicroVectors * kV;
constexpr double kLog2E = 1.4426950408889634;

// What scores are multiplied by before they are formed: the largest power of two up to `scale` (and 1). The rest of it is
// scale / score_factor, 1 to 2. 2^-16 is less than any model's, and makes no ordinary key subnormal.
static float score_factor(const AttentionParams& p) {
  int exponent;
  std::frexp(p.scale, &exponent);
  return std::ldexp(1.0f, std::min(0, std::max(-16, exponent - 1)));
}

// The keys of one head, packed.
struct HeadKeys {
  const KeyPanel* panels;
  int64_t count;
  const float* columns;  // [panel][words][kV], times score_factor
  const float* far_low;  // k . pos_query at the saturated low end, [panel][kV]; -inf for keys that are masked
  const float* far_high;
};

// The queries of one row block, packed.
struct BlockRows {
  const RowPanel* panels;
  int count;
  const float* words;  // [count * kV][padded words]
};

// Turns vectors [distance][key] into vectors [query][key]: lane c of what step r returns is lane c of the vector that
// step r - c was given. Every step must be a constant, so that all of this stays in registers.
struct Shear {
  vf late[kV - 1];  // of each power of two s < kV, the last s vectors whose lanes lag by their index modulo s

  DK_INLINE_MEMBER Shear() {
    DK_UNROLL
    for (int i = 0; i < kV - 1; i++) late[i] = zero();
  }
  DK_INLINE_MEMBER vf step(vf x, int r) {
    DK_UNROLL
    for (int s = 1; s < kV; s *= 2) {
      const LaneBits lanes = kAllLanes / ((1u << s) + 1) << s;  // those with bit s in their index
      vf& before = late[s - 1 + r % s];
      const vf sheared = select(lanes, before, x);
      before = x;
      x = sheared;
    }
    return x;
  }
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
  float* p2c;                // kMicroVectors times p2c_size: [slot of the window][kV] of the current key panels
  int words, padded;
  NextHead* next_head;  // stepped with every tile

  static int64_t c2p_stride(const SlotIndex& index) { return index.columns + kV; }
  static int64_t p2c_size(const SlotIndex& index) { return kV * c2p_stride(index); }
  int64_t c2p_stride() const { return c2p_stride(index); }

  struct Window {  // columns [first, stop) of a table
    int64_t first, stop;
  };
  // Columns from slot low to slot high, rounded outwards to multiples of `unit`.
  Window window(int64_t low, int64_t high, int unit) const {
    if (!index.smooth) return {0, index.columns};
    return {low / unit * unit, (high + unit) / unit * unit};
  }
  ColumnSource table_columns(const float* table, int64_t first) const {
    return {table + first * words, (ptrdiff_t)words * kV, kV};
  }

  // Columns of pos_key that row panel r needs for any key; empty if no key is allowed.
  Window c2p_window(int r, int unit = kV) const {
    if (!keys.count) return {0, 0};
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (const int64_t k : {(int64_t)0, keys.count - 1}) {
      low = std::min(low, keys.panels[k].position);
      high = std::max(high, keys.panels[k].position + kV - 1);
    }
    const int64_t row = rows.panels[r].row;
    return window(index.key_slot(low - (row + kV - 1)), index.key_slot(high - row), unit);
  }
  // Columns of pos_query that key panel k needs for any row of the block; empty if every tile is saturated.
  Window p2c_window(int64_t k, int unit = kV) const {
    const int64_t position = keys.panels[k].position;
    const int64_t low = rows.panels[0].row - position - (kV - 1);
    const int64_t high = rows.panels[rows.count - 1].row - position + (kV - 1);
    if (high <= index.low_end || low >= index.high_start) return {0, 0};
    return window(index.query_slot(low), index.query_slot(high), unit);
  }

  // c2p = score_factor * rows . pos_key for every row of the block. Call once per block.
  void start_rows() const {
    if (!tables.pos_key || !keys.count) return;
    const float factor = score_factor(params);
    float scaled[kV * kMaxHeadDim];
    for (int r = 0; r < rows.count; r++) {
      const Window w = c2p_window(r);
      const float* from = rows.words + r * kV * padded;
      if (factor != 1.0f) {
        for (int i = 0; i < kV * padded; i += kV) store(scaled + i, Word::scaled(load(from + i), set1(factor)));
        from = scaled;
      }
      gemm<Word>(kV, (int)((w.stop - w.first) / kV), words, {from, padded, 1}, table_columns(tables.pos_key, w.first),
                 c2p + r * kV * c2p_stride() + w.first, c2p_stride(), false);
    }
  }

  // What the index does over the distances of a tile.
  enum Zone {
    kNone,    // no bias: prefix keys, or no position terms
    kLow,     // saturated at the low end: one slot
    kHigh,    // saturated at the high end
    kLinear,  // neighbours are exactly one slot apart
    kSmooth,  // neighbours are 0 or 1 slot apart
    kAny,     // the index jumps or falls somewhere
    kMixed,   // of several tiles: anything but all of them saturated at the same end
  };
  Zone zone_of(int64_t x, bool has_position) const {  // x = distance of the tile's first query and key
    if (!has_position || !(tables.pos_key || tables.pos_query)) return kNone;
    if (x + kV - 1 <= index.low_end) return kLow;
    if (x - (kV - 1) >= index.high_start) return kHigh;
    if (!index.smooth) return kAny;
    const int32_t* slots = index.query_slots_at(x);
    return slots[kV - 1] - slots[1 - kV] == 2 * kV - 2 ? kLinear : kSmooth;
  }

  static bool is_far(Zone zone) { return zone == kLow || zone == kHigh; }
  int64_t distance(int r, int64_t k) const { return rows.panels[r].row - keys.panels[k].position; }

  // Zones of all row panels with some key panels.
  struct Zones {
    Zone tile[kMostRows / kV][kMicroVectors];
    Zone together[kMostRows / kV];  // kLow or kHigh where all tiles are in it, else kMixed
  };
  void find_zones(int64_t first, int count, Zones& zones) const {
    for (int r = 0; r < rows.count; r++) {
      Zone together = kMixed;
      for (int i = 0; i < count; i++) {
        const Zone zone = zone_of(distance(r, first + i), keys.panels[first + i].has_position);
        zones.tile[r][i] = zone;
        if (i == 0 && is_far(zone)) together = zone;
        if (zone != together) together = kMixed;
      }
      zones.together[r] = together;
    }
  }

  // The rows of pos_query that the near tiles of key panel k, the i-th of `zones`, need beside tiles in other zones.
  Window near_window(int64_t k, int i, const Zones& zones) const {
    int first = rows.count, last = -1;
    for (int r = 0; r < rows.count; r++) {
      if (zones.together[r] != kMixed || is_far(zones.tile[r][i])) continue;
      first = std::min(first, r);
      last = r;
    }
    if (last < 0 || !tables.pos_query || !keys.panels[k].has_position) return {0, 0};
    if (!index.smooth) return {0, index.columns};
    return {index.query_slot(distance(first, k) - (kV - 1)) / kMicroRows * kMicroRows,
            index.query_slot(distance(last, k) + (kV - 1)) / kMicroRows * kMicroRows + kMicroRows};
  }

  // p2c = pos_query . keys of panels [first, first + count), each over its window. Neighbours share most of the table.
  void start_panels(int64_t first, int count, const Window* windows) const {
    int64_t low = INT64_MAX, high = 0;
    for (int i = 0; i < count; i++) {
      if (windows[i].first < windows[i].stop) low = std::min(low, windows[i].first);
      high = std::max(high, windows[i].stop);
    }
    for (low = low / kV * kV; low < high; low += kV)
      for (int i = 0; i < count; i++) {
        const int64_t from = std::max(low, windows[i].first), to = std::min(low + kV, windows[i].stop);
        if (from < to)
          gemm_rows<Word, 1>((int)(to - from), {tables.pos_query + low * words + (from - low), 1, kV},
                             {keys.columns + (first + i) * words * kV, 0, kV},
                             p2c + i * p2c_size(index) + (from - windows[i].first) * kV, kV, words, false);
      }
  }

  // The position terms of key panel k with row panel r, [kV][kBiasStride]; -inf where a key is masked.
  void bias_tile(Zone zone, int64_t k, int r, Window w, const float* p2c, float* to) const {
    if (is_far(zone) || zone == kNone) return far_tile(k, r, zone, to);
    if (zone == kLinear) near_tile<kLinear>(k, r, w, p2c, to);
    else if (zone == kSmooth) near_tile<kSmooth>(k, r, w, p2c, to);
    else near_tile<kAny>(k, r, w, p2c, to);
    const LaneBits allowed = keys.panels[k].allowed;
    for (int i = 0; allowed != kAllLanes && i < kV; i++)
      store(to + i * kBiasStride, select(allowed, load(to + i * kBiasStride), set1(-INFINITY)));
  }

  // The position terms of a tile that is not saturated, [kV][kBiasStride], from the bands of its row and key panel.
  // `query_slots` and `key_slots` are where the index has the first pair; p2c holds slots from 0 on.
  template <Zone kZone, bool kQuery, bool kKey>
  DK_NOINLINE static void add_bands(const float* p2c, const int32_t* query_slots, const float* c2p, int64_t stride,
                                    const int32_t* key_slots, float* to) {
    Shear shear;
    const auto key_terms = [&](int i) {  // of the query in row i - key
      return load(p2c + (kZone == kLinear ? query_slots[1 - kV] + i + kV - 1 : query_slots[i]) * (ptrdiff_t)kV);
    };
    if (kQuery) {
      DK_UNROLL
      for (int i = 1; i < kV; i++) shear.step(key_terms(i - kV), i);
    }
    DK_UNROLL
    for (int i = 0; i < kV; i++) {
      vf bias = kQuery ? shear.step(key_terms(i), i) : zero();
      if (kKey) {
        // Going down one row of the tile moves one slot back along the band.
        if (kZone == kLinear) bias = bias + load(c2p + key_slots[0] + i * (stride - 1));
        else if (kZone == kSmooth) bias = bias + lookup(c2p + i * stride + key_slots[-i], key_slots - i);
        else {
          float values[kV];
          for (int c = 0; c < kV; c++) values[c] = c2p[i * stride + key_slots[c - i]];
          bias = bias + load(values);
        }
      }
      store(to + i * kBiasStride, bias);
    }
  }

  template <Zone kZone>
  DK_INLINE_MEMBER void near_tile(int64_t k, int r, Window w, const float* p2c, float* to) const {
    const int64_t x = distance(r, k), stride = c2p_stride();
    const float *c2p_rows = c2p + r * kV * stride, *p2c_rows = p2c - w.first * kV;
    const int32_t *query_slots = index.query_slots_at(x), *key_slots = index.key_slots_at(-x);
    if (!tables.pos_query) add_bands<kZone, false, true>(p2c_rows, query_slots, c2p_rows, stride, key_slots, to);
    else if (!tables.pos_key) add_bands<kZone, true, false>(p2c_rows, query_slots, c2p_rows, stride, key_slots, to);
    else add_bands<kZone, true, true>(p2c_rows, query_slots, c2p_rows, stride, key_slots, to);
  }

  // Saturated or without position, beside tiles that are not.
  void far_tile(int64_t k, int r, Zone zone, float* to) const {
    const FarTerms far = far_terms(r, k, zone);
    const vf of_keys = zone == kNone ? select(keys.panels[k].allowed, zero(), set1(-INFINITY)) : load(far.keys);
    for (int i = 0; i < kV; i++) store(to + i * kBiasStride, of_keys + set1(far.rows[i * far.row_step]));
  }

  // Both terms of a saturated tile are one number per query and one per key.
  struct FarTerms {
    const float* rows;
    ptrdiff_t row_step;
    const float* keys;
  };
  FarTerms far_terms(int r, int64_t k, Zone zone) const {
    static const float kZero = 0.0f;
    const float* far_keys = (zone == kHigh ? keys.far_high : keys.far_low) + k * kV;
    if (!tables.pos_key || zone == kNone) return {&kZero, 0, far_keys};
    const int64_t slot = index.key_slot(zone == kHigh ? -index.reach : index.reach);
    return {c2p + r * kV * c2p_stride() + slot, (ptrdiff_t)c2p_stride(), far_keys};
  }

  LaneBits pair_bits(const RowPanel& row, int r, const KeyPanel& key) const {
    if (r >= row.count) return 0;
    return bits_from_bytes(pair_mask + (row.row + r) * params.pair_mask_stride_q + key.key, key.count);
  }

  // Scores of kMicroRows rows: products, and the bias from `bias_rows` or, of saturated tiles, from its two terms.
  template <int kVectors, bool kFar>
  DK_INLINE_MEMBER void score_rows(RowSource q, ColumnSource k, const float* bias_rows, FarTerms far, float* scores,
                                   float* maxima) const {
    Sum sum[kMicroRows][kVectors];
    multiply<Word>(q, k, words, sum);
    DK_UNROLL
    for (int r = 0; r < kMicroRows; r++) {
      vf largest = set1(-INFINITY);
      DK_UNROLL
      for (int n = 0; n < kVectors; n++) {
        float* to = scores + r * kBlockKeys + n * kV;
        const vf bias = kFar ? load(far.keys + n * kV) + set1(far.rows[r * far.row_step])
                             : load(bias_rows + r * kBiasStride + n * kV);
        const vf score = rounded(sum[r][n]) + bias;
        store(to, score);
        largest = max_keep_nan(largest, score);
      }
      if (maxima) store(maxima + r * kV, max_keep_nan(load(maxima + r * kV), largest));
    }
  }

  // All rows with key panels [first, first + kVectors).
  template <int kVectors>
  DK_NOINLINE void score_panels(int64_t first, float* scores, float* maxima) const {
    const ColumnSource k{keys.columns + first * words * kV, (ptrdiff_t)words * kV, kV};
    Zones zones;
    find_zones(first, kVectors, zones);
    Window windows[kVectors];
    for (int n = 0; n < kVectors; n++) windows[n] = near_window(first + n, n, zones);
    start_panels(first, kVectors, windows);
    alignas(64) float bias[kV * kBiasStride];
    for (int r = 0; r < rows.count; r++) {
      const bool mixed = zones.together[r] == kMixed;
      FarTerms far = far_terms(r, first, zones.together[r]);
      for (int n = 0; n < kVectors; n++) {
        next_head->step();
        if (mixed) bias_tile(zones.tile[r][n], first + n, r, windows[n], p2c + n * p2c_size(index), bias + n * kV);
      }
      for (int i = 0; i < kV; i += kMicroRows, far.rows += kMicroRows * far.row_step) {
        const int row = r * kV + i;
        const RowSource q{this->rows.words + row * padded, padded, 1};
        float *to = scores + row * kBlockKeys, *maximum = maxima ? maxima + row * kV : nullptr;
        if (mixed) score_rows<kVectors, false>(q, k, bias + i * kBiasStride, far, to, maximum);
        else score_rows<kVectors, true>(q, k, nullptr, far, to, maximum);
      }
    }
  }

  // Scores[count * kV][kBlockKeys] of the block's rows with key panels [first, first + panels); if asked for,
  // the largest score of each row as kV candidates, maxima[count * kV][kV]. A NaN may be lost in them.
  void scores(int64_t first, int panels, float* scores, float* maxima = nullptr) const {
    if (maxima) std::fill(maxima, maxima + rows.count * kV * kV, -INFINITY);
    for (int i = 0, take; i < panels; i += take) {
      take = next_vectors(panels - i);
      if (take == 3) score_panels<3>(first + i, scores + i * kV, maxima);
      else if (take == 2) score_panels<2>(first + i, scores + i * kV, maxima);
      else score_panels<1>(first + i, scores + i * kV, maxima);
    }
    if (pair_mask) mask_pairs(first, panels, scores, maxima);
  }

  void mask_pairs(int64_t first, int panels, float* scores, float* maxima) const {
    const vf masked = set1(-INFINITY);
    for (int r = 0; r < rows.count * kV; r++) {
      vf largest = masked;
      for (int i = 0; i < panels; i++) {
        float* score = scores + r * kBlockKeys + i * kV;
        const KeyPanel& key = keys.panels[first + i];
        store(score, select(key.allowed & pair_bits(rows.panels[r / kV], r % kV, key), load(score), masked));
        largest = max_keep_nan(largest, load(score));
      }
      if (maxima) store(maxima + r * kV, largest);
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
  const float factor = score_factor(p);
  for (int64_t i = 0; i < count; i++)
    pack_panel<Word, true>(k, panels[i].key, panels[i].allowed, (int)p.head_dim, columns + i * words * kV, factor);
  float *low = far, *high = far + count * kV;
  if ((tables.pos_key || tables.pos_query) && (s.nq > index.high_start || -s.nk < index.low_end)) {
    for (int end = 0; end < 2; end++) {
      const int64_t slot = index.query_slot(end ? index.reach : -index.reach);
      const int64_t at = slot / kV * kV * words + slot % kV;
      for (int64_t i = 0; i < count; i++) {
        float* to = (end ? high : low) + i * kV;
        if (!tables.pos_query) store(to, zero());
        else
          micro_kernel<Word, 1, 1>({tables.pos_query + at, 0, kV}, {columns + i * words * kV, 0, kV}, to, 0, words,
                                   false);
        store(to, select(panels[i].allowed, load(to), set1(-INFINITY)));
      }
    }
  }
  return {panels, count, columns, low, high};
}

}  // namespace
