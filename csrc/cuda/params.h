// The arguments of the CUDA kernels: one struct, passed by value. Apart from the tensor maps every field is 8 bytes
// wide, so that a host which packs bytes cannot pad it differently. Strides count elements. README.md says how a host
// fills it.
#pragma once
#ifdef __CUDACC_RTC__  // compiled at run time, where there are no headers at all
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

namespace dk {

constexpr int kForwardAbiVersion = 1;
constexpr int kBackwardAbiVersion = 1;

// What cuTensorMapEncodeTiled writes: a CUtensorMap, named here so that no CUDA header is needed.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// A launch of disentangled_forward_*.
struct ForwardParams {
  TensorMap k, v;                 // see "Tensor maps" in README.md
  TensorMap pos_key, pos_query;   // of the two expanded tables

  const void* q;                  // (batch, heads, nq, D), last dimension contiguous, rows on 4-byte boundaries
  int64_t q_stride_b, q_stride_h, q_stride_n;
  void* out;                      // (batch, nq, heads, D) contiguous; packed: (tokens, heads, D)
  float* lse;                     // (batch, heads, nq) contiguous, natural log; packed: (heads, tokens)

  const void* pos_key_rows;       // (heads, table_rows, D): the memory that the map of pos_key describes
  const void* pos_query_rows;
  int64_t table_rows;             // rows per head of an expanded table
  int64_t table_offset;           // row of distance 0
  int64_t low_end;                // every distance <= low_end, below 0, has the same row in the position tables ...
  int64_t high_start;             // ... and so has every distance >= high_start, at least 0

  const float* mean;              // (batch, heads, D) contiguous: mean of v over all keys; null without any mask
  const uint8_t* key_mask;        // (batch, nk), 0 = masked, last dimension contiguous; or null
  int64_t key_mask_stride_b;
  const uint8_t* query_mask;      // (batch, nq), 0 = padding row, last dimension contiguous; or null
  int64_t query_mask_stride_b;
  const uint8_t* pair_mask;       // (batch, 1 or heads, nq, nk), 0 = forbidden; read by the *_pair kernels only
  int64_t pair_mask_stride_b, pair_mask_stride_h, pair_mask_stride_m, pair_mask_stride_n;
  const int32_t* cu_seqlens;      // (batch + 1) when packed, else null
  const int64_t* seed;            // one integer; read by the *_dropout kernels only

  int64_t batch;                  // samples, or sequences when packed
  int64_t heads;
  int64_t nq, nk;                 // tokens of a sample; packed: tokens of all sequences together
  int64_t prefix;                 // leading keys without a position; nk where there are no tables
  int64_t row_tiles;              // blocks per sample and head: the longest sequence over the rows of a block, up
  int64_t dropout_threshold;      // 16-bit draws below it drop
  double qk_scale;                // scale * log2(e); positive
  double keep_scale;              // factor on kept probabilities; 1 without dropout
};

// What a host must know of a compiled kernel: the module's symbol disentangled_forward_info.
struct ForwardInfo {
  int32_t abi_version;            // kForwardAbiVersion of its source
  int32_t head_dim;               // D
  int32_t rows;                   // queries of a block
  int32_t keys;                   // keys of a tile, and rows of a table block
  int32_t threads;                // of a block
  int32_t shared_bytes;           // dynamic shared memory of a block
  int32_t table_margin;           // rows an expanded table needs beyond the last distance, on each side
};

// A launch of disentangled_backward_*. The expanded tables are reversed: row `table_offset + x` is that of distance -x.
struct BackwardParams {
  TensorMap q, dout;              // see "Launching the backward" in README.md
  TensorMap q_far;                // q plus the end rows of pos_query: first the rows of distances <= low_end, for all
                                  // samples, then those of distances >= high_start
  TensorMap pos_key, pos_query;   // of the two expanded tables, reversed

  const void* k;                  // (batch, heads, nk, D), last dimension contiguous, rows on 4-byte boundaries
  int64_t k_stride_b, k_stride_h, k_stride_n;
  const void* v;
  int64_t v_stride_b, v_stride_h, v_stride_n;
  void* dk;                       // (batch, nk, heads, D) contiguous; packed: (tokens, heads, D)
  void* dv;
  void* dq;                       // (batch, nq, heads, D) contiguous; packed: (tokens, heads, D)

  const float* lse2;              // (batch, heads, nq): lse in units of log2; +inf where a query has no softmax
  const float* out_dot_dout;      // (2, batch, heads, nq): sum of out * dout, less dlse; behind that dlse, likewise: a
                                  // block that has all keys of a query knows the sum better than `out`
  const float* far_constants;     // (2, batch, heads, nq): q . a in units of log2, with the end rows a of pos_key
  const float* dmean;             // (batch, heads, D): what rows without a softmax add to each row of dv; or null

  float* dq_sums;                 // (tiles of queries, heads, 64 * D), see "Sums"; zeroed by the host
  float* dtables;                 // (2, heads, table_rows / 64, 64 * D): gradients of pos_key and of pos_query; zeroed
  int64_t dtables_stride_b, dtables_stride_consumer;  // from one copy of it to the next; 0: they share one
  float* far_sums;                // (2 tables, 2 sides, heads, batch * key_blocks * keys / 64, D); zeroed

  const void* pos_key_rows;       // (heads, table_rows, D): the memory that the map of pos_key describes
  const void* pos_query_rows;
  int64_t table_rows;             // a multiple of 64
  int64_t table_offset;           // row of distance 0
  int64_t low_end;                // as in ForwardParams
  int64_t high_start;

  const uint8_t* key_mask;        // masks as in ForwardParams; that of the queries is in lse2
  int64_t key_mask_stride_b;
  const uint8_t* pair_mask;
  int64_t pair_mask_stride_b, pair_mask_stride_h, pair_mask_stride_m, pair_mask_stride_n;
  const int32_t* cu_seqlens;
  const int64_t* seed;

  int64_t batch, heads, nq, nk, prefix;  // as in ForwardParams
  int64_t row_tiles;              // tiles of queries per sample and head: the longest sequence over 64, up
  int64_t key_blocks;             // blocks of keys per sample and head, of the longest sequence
  int64_t groups;                 // thread blocks per sample and head; each takes every groups-th block of keys
  int64_t dropout_threshold;
  double qk_scale;                // scale * log2(e); positive
  double scale;
  double keep_scale;
};

// What a host must know of a compiled kernel: the module's symbol disentangled_backward_info.
struct BackwardInfo {
  int32_t abi_version;            // kBackwardAbiVersion of its source
  int32_t head_dim;               // D
  int32_t keys;                   // of a block
  int32_t queries;                // of a tile, and rows of a table block
  int32_t threads;                // of a block
  int32_t shared_bytes;           // dynamic shared memory of a block
  int32_t table_margin;           // rows an expanded table needs beyond the last distance, on each side
};

}  // namespace dk
