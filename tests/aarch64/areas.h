// The memory that one call reads and writes: found from its arguments, copied to the shared memory and back.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/params.h"
#include "message.h"

class Areas {
 public:
  // `bytes` from `low` on, where params[word], which points to `data`, may lead.
  void add(int64_t word, const void* data, const void* low, int64_t bytes, bool written = false) {
    if (!data) return;
    pointers_.push_back({word, (char*)data});
    if (bytes > 0) areas_.push_back({(char*)low, (char*)low + bytes, written, 0});
  }
  void add(int64_t word, const void* data, int64_t bytes, bool written = false) {
    add(word, data, data, bytes, written);
  }

  // Lay out the areas, those that overlap as one, and copy them; false where there is no room.
  bool send(Message& m) {
    merge();
    char* base = reinterpret_cast<char*>(&m);
    int64_t at = kFirstArea;
    m.guards = m.pointers = 0;
    for (Area& area : areas_) {
      const int64_t within = (int64_t)area.low % kPage, bytes = area.high - area.low;
      const int64_t end = at + kPage + (within + bytes + kPage - 1) / kPage * kPage;
      if (end + kPage > kSharedBytes) return false;
      m.guard[m.guards++] = at;
      m.guard[m.guards++] = end;
      area.offset = at + kPage + within;
      std::memcpy(base + area.offset, area.low, (size_t)bytes);
      at = end + kPage;
    }
    for (const Place& place : pointers_) m.pointer[m.pointers++] = {place.word, offset_of(place.data)};
    return true;
  }

  // Copy back what was written, and nothing else: others may own what lies between the rows of a tensor.
  void receive(const Message& m) const {
    const char* base = reinterpret_cast<const char*>(&m);
    for (const Area& area : areas_) {
      const char* from = base + area.offset;
      for (char* to = area.low; area.written && to < area.high; to += kBlock, from += kBlock) {
        const int64_t count = std::min(kBlock, (int64_t)(area.high - to));
        if (!std::memcmp(to, from, (size_t)count)) continue;
        for (int64_t i = 0; i < count; i++)
          if (to[i] != from[i]) to[i] = from[i];
      }
    }
  }

 private:
  static constexpr int64_t kBlock = 64;
  struct Area {
    char *low, *high;
    bool written;
    int64_t offset;
  };
  struct Place {
    int64_t word;
    char* data;
  };

  void merge() {
    std::sort(areas_.begin(), areas_.end(), [](const Area& a, const Area& b) { return a.low < b.low; });
    std::vector<Area> merged;
    for (const Area& area : areas_) {
      if (!merged.empty() && area.low < merged.back().high) {
        merged.back().high = std::max(merged.back().high, area.high);
        merged.back().written |= area.written;
      } else {
        merged.push_back(area);
      }
    }
    areas_ = merged;
  }
  int64_t offset_of(const char* data) const {
    for (const Area& area : areas_)
      if (data >= area.low && data < area.high) return area.offset + (data - area.low);
    return kFirstArea;  // of a tensor without elements: a page that is forbidden, or of no use
  }

  std::vector<Area> areas_;
  std::vector<Place> pointers_;
};

namespace dk {

inline int64_t size_of(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// The place of a field among the words of its struct.
#define DK_WORD(p, field) ((int64_t)(offsetof(std::remove_reference_t<decltype(p)>, field) / sizeof(int64_t)))

inline void add_tokens(Areas& areas, int64_t word, const AttentionParams& p, const Tensor4& t, int64_t length,
                       bool written) {
  const int64_t counts[3] = {p.cu_seqlens ? 1 : p.batch, p.heads, p.cu_seqlens ? p.cu_seqlens[p.batch] : length};
  const int64_t strides[3] = {t.stride_b, t.stride_h, t.stride_n}, size = size_of(p.dtype);
  int64_t low = 0, high = p.head_dim;
  for (int d = 0; d < 3; d++) {
    (strides[d] < 0 ? low : high) += (counts[d] - 1) * strides[d];
  }
  const bool is_empty = std::find(counts, counts + 3, 0) != counts + 3;
  areas.add(word, t.data, is_empty ? t.data : (char*)t.data + low * size, is_empty ? 0 : (high - low) * size, written);
}

inline void add_statistics(Areas& areas, int64_t word, const AttentionParams& p, const float* data, bool written) {
  const int64_t batch = p.cu_seqlens ? 1 : p.batch, length = p.cu_seqlens ? p.cu_seqlens[p.batch] : p.nq;
  const int64_t count =
      batch && p.heads && length ? (batch - 1) * p.lse_stride_b + (p.heads - 1) * p.lse_stride_h + length : 0;
  areas.add(word, data, count * 4, written);
}

inline void add_tables(Areas& areas, const AttentionParams& p) {
  const int64_t rows = p.heads ? p.table_rows : 0, size = size_of(p.dtype);
  const auto table = [&](int64_t word, const void* data, int64_t stride_h, int64_t stride_r) {
    areas.add(word, data, rows ? ((p.heads - 1) * stride_h + (rows - 1) * stride_r + p.head_dim) * size : 0);
  };
  table(DK_WORD(p, pos_key), p.pos_key, p.pos_key_stride_h, p.pos_key_stride_r);
  table(DK_WORD(p, pos_query), p.pos_query, p.pos_query_stride_h, p.pos_query_stride_r);
  areas.add(DK_WORD(p, prepared), p.prepared, p.prepared_bytes);
  const int64_t gradients = rows ? ((p.heads - 1) * p.dpos_stride_h + rows * p.head_dim) * 4 : 0;
  areas.add(DK_WORD(p, dpos_key), p.dpos_key, gradients, true);
  areas.add(DK_WORD(p, dpos_query), p.dpos_query, gradients, true);
  areas.add(DK_WORD(p, delta), p.delta, (2 * p.reach + 1) * 4);
}

inline void add_masks(Areas& areas, const AttentionParams& p) {
  const bool any = p.batch && p.heads && p.nq && p.nk;
  areas.add(DK_WORD(p, key_mask), p.key_mask, any ? (p.batch - 1) * p.key_mask_stride_b + p.nk : 0);
  areas.add(DK_WORD(p, query_mask), p.query_mask, any ? (p.batch - 1) * p.query_mask_stride_b + p.nq : 0);
  const int64_t pairs = (p.batch - 1) * p.pair_mask_stride_b + (p.heads - 1) * p.pair_mask_stride_h +
                        (p.nq - 1) * p.pair_mask_stride_q + p.nk;
  areas.add(DK_WORD(p, pair_mask), p.pair_mask, any ? pairs : 0);
  areas.add(DK_WORD(p, cu_seqlens), p.cu_seqlens, (p.batch + 1) * 4);
}

inline Areas areas_of(const AttentionParams& p) {
  Areas areas;
  const auto tokens = [&](int64_t word, const Tensor4& t, int64_t n, bool written) {
    add_tokens(areas, word, p, t, n, written);
  };
  tokens(DK_WORD(p, q), p.q, p.nq, false);
  tokens(DK_WORD(p, k), p.k, p.nk, false);
  tokens(DK_WORD(p, v), p.v, p.nk, false);
  tokens(DK_WORD(p, out), p.out, p.nq, true);
  tokens(DK_WORD(p, dout), p.dout, p.nq, false);
  tokens(DK_WORD(p, dq), p.dq, p.nq, true);
  tokens(DK_WORD(p, dk), p.dk, p.nk, true);
  tokens(DK_WORD(p, dv), p.dv, p.nk, true);
  add_statistics(areas, DK_WORD(p, lse), p, p.lse, true);
  add_statistics(areas, DK_WORD(p, dlse), p, p.dlse, false);
  add_tables(areas, p);
  add_masks(areas, p);
  return areas;
}

inline Areas areas_of(const LinearParams& p) {
  Areas areas;
  const int64_t size = size_of(p.dtype);
  areas.add(DK_WORD(p, x), p.x, p.tokens * p.in_features * size);
  areas.add(DK_WORD(p, weight), p.weight, p.out_features * p.in_features * size);
  areas.add(DK_WORD(p, bias), p.bias, p.out_features * size);
  areas.add(DK_WORD(p, out), p.out, p.tokens * p.out_features * size, true);
  return areas;
}

inline Areas areas_of(const DropoutParams& p) {
  Areas areas;
  areas.add(DK_WORD(p, x), p.x, p.count * size_of(p.x_dtype));
  areas.add(DK_WORD(p, residual), p.residual, p.count * size_of(p.residual_dtype));
  areas.add(DK_WORD(p, out), p.out, p.count * size_of(p.out_dtype), true);
  return areas;
}

}  // namespace dk
