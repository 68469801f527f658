// The position tables as the kernels read them: packed columns, and the distance index with its saturated ends.
#pragma once
#include <algorithm>
#include <vector>

#include "pack.h"

namespace {

constexpr int kIndexMargin = 64;  // distances past `reach` that a tile at the border may look up

// For one call: which packed table column, or *slot*, belongs to a distance. query_slot(x) is the slot of pos_query for
// x = i - j and rises with x; the columns of pos_key are packed in reverse, so that key_slot(y), y = j - i, rises with
// the key. Tiles read whole vectors of slots unclamped (`*_slots_at`): ScoreBlock::zone_of sends only distances below
// reach + 2 * kV there, which kIndexMargin covers.
struct SlotIndex {
  int64_t reach;  // both arrays hold |x| <= reach + kIndexMargin, and a vector more
  int64_t low_end, high_start;
  bool smooth;
  int64_t rows, columns;  // table rows, and that rounded up to whole vectors
  std::vector<int32_t> query_slots, key_slots;

  explicit SlotIndex(const AttentionParams& p)
      : reach(p.reach), low_end(p.low_end), high_start(p.high_start), smooth(p.smooth != 0), rows(p.table_rows),
        columns(round_to_vector(p.table_rows)) {
    if (!rows) return;  // no position terms
    const int64_t far = reach + kIndexMargin, size = 2 * far + 1 + kV;
    query_slots.resize(size);
    key_slots.resize(size);
    for (int64_t x = -far; x < -far + size; x++) {
      const int64_t inside = x < -reach ? -reach : (x > reach ? reach : x);
      int64_t slot = p.delta[inside + reach] - p.first_row;
      slot = slot < 0 ? 0 : (slot >= rows ? rows - 1 : slot);  // distances no pair of tokens has
      query_slots[x + far] = (int32_t)slot;
    }
    for (int64_t y = -far; y < -far + size; y++) key_slots[y + far] = (int32_t)(columns - 1 - query_slot(clamp(-y)));
  }
  int64_t clamp(int64_t x) const {
    const int64_t far = reach + kIndexMargin;
    return x < -far ? -far : (x > far ? far : x);
  }
  int32_t query_slot(int64_t x) const { return query_slots[clamp(x) + reach + kIndexMargin]; }
  int32_t key_slot(int64_t y) const { return key_slots[clamp(y) + reach + kIndexMargin]; }
  const int32_t* query_slots_at(int64_t x) const { return query_slots.data() + x + reach + kIndexMargin; }
  const int32_t* key_slots_at(int64_t y) const { return key_slots.data() + y + reach + kIndexMargin; }
};

DK_INLINE Rows pos_key_rows(const AttentionParams& p, int64_t h) {
  const int64_t size = bytes_of(p.dtype);
  char* data = static_cast<char*>(const_cast<void*>(p.pos_key));
  return {data + h * p.pos_key_stride_h * size, p.pos_key_stride_r * size, p.dtype};
}
DK_INLINE Rows pos_query_rows(const AttentionParams& p, int64_t h) {
  const int64_t size = bytes_of(p.dtype);
  char* data = static_cast<char*>(const_cast<void*>(p.pos_query));
  return {data + h * p.pos_query_stride_h * size, p.pos_query_stride_r * size, p.dtype};
}

// Packed columns of both tables of one head: [pos_key reversed][pos_query], each [columns / kV][words][kV].
template <class Word>
struct PackedTables {
  static int64_t floats_per_table(const AttentionParams& p) {
    return round_to_vector(p.table_rows) * words_of<Word>((int)p.head_dim);
  }
  static int64_t floats_per_head(const AttentionParams& p) {
    return floats_per_table(p) * ((p.has_pos_key != 0) + (p.has_pos_query != 0));
  }
  const float* pos_key;
  const float* pos_query;

  PackedTables(const AttentionParams& p, const float* packed, int64_t h) {
    const float* head = packed + h * floats_per_head(p);
    pos_key = p.has_pos_key ? head : nullptr;
    pos_query = p.has_pos_query ? head + (p.has_pos_key ? floats_per_table(p) : 0) : nullptr;
  }

  static void pack(const AttentionParams& p, int64_t h, float* packed) {
    const int head_dim = (int)p.head_dim;
    const int64_t words = words_of<Word>(head_dim), columns = round_to_vector(p.table_rows);
    float* to = packed + h * floats_per_head(p);
    if (p.has_pos_key) {
      Rows table = pos_key_rows(p, h);
      table.data += (p.table_rows - 1) * table.stride;  // last row first
      table.stride = -table.stride;
      const int64_t skipped = columns - p.table_rows;  // empty columns in front
      for (int64_t c = 0; c < columns; c += kV, to += words * kV)
        pack_panel<Word>(table, c - skipped,  // rows before the first are not present
                         ~first_lanes((int)std::min<int64_t>(kV, std::max<int64_t>(0, skipped - c))), head_dim, to);
    }
    if (p.has_pos_query) {
      const Rows table = pos_query_rows(p, h);
      for (int64_t c = 0; c < columns; c += kV, to += words * kV)
        pack_panel<Word>(table, c, first_lanes((int)std::min<int64_t>(kV, p.table_rows - c)), head_dim, to);
    }
  }
};

}  // namespace
