// The structs that cross the C ABI. deberta_kernels/native/params.py has the same fields, which both sides compare by
// layout.h; every field is 8 bytes wide so that no compiler can pad it differently. All strides count elements.
#pragma once
#include <atomic>
#include <cstdint>

namespace dk {

constexpr int64_t kAbiVersion = 10;
constexpr int kMaxHeadDim = 256;
constexpr int64_t kChecksumKeyBytes = 4176;

// GOMP_parallel, as gcc calls it for `#pragma omp parallel num_threads(threads)`. The package hands over the one that
// PyTorch uses: with a runtime of our own there would be a second pool of threads in the process.
using TeamRunner = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
extern std::atomic<TeamRunner> team_runner;

enum DataType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A (batch, heads, length, head_dim) tensor whose last dimension is contiguous.
struct Tensor4 {
  void* data;
  int64_t stride_b, stride_h, stride_n;
};

struct AttentionParams {
  int64_t abi_version;
  int64_t batch;  // samples, or sequences when cu_seqlens is given
  int64_t heads;
  int64_t nq, nk;  // tokens per sample; no sequence is longer when cu_seqlens is given
  int64_t head_dim;
  int64_t dtype;  // DataType of tokens (q, k, v, out, their gradients) and of pos_key, pos_query
  int64_t threads;

  Tensor4 q, k, v;
  Tensor4 out;  // written by forward, read by backward
  Tensor4 dout;
  Tensor4 dq, dk, dv;  // data may be null where no gradient is wanted
  float* lse;          // (batch, heads, nq), or (heads, tokens) when packed; natural log
  const float* dlse;   // layout of lse, or null
  int64_t lse_stride_b, lse_stride_h;

  const void* pos_key;  // (heads, table_rows, head_dim), last dimension contiguous, or null
  const void* pos_query;
  int64_t pos_key_stride_h, pos_key_stride_r, pos_query_stride_h, pos_query_stride_r;
  const void* prepared;    // what dk_cpu_prepare wrote for these tables, or null
  int64_t prepared_bytes;  // of its memory
  float* dpos_key;         // (heads, table_rows, head_dim) float32, rows contiguous, or null
  float* dpos_query;
  int64_t dpos_stride_h;
  int64_t has_pos_key, has_pos_query;  // the terms exist, whether from the tables or from `prepared`
  int64_t table_rows;
  int64_t first_row;      // row of the full table held by row 0
  int64_t prefix_length;  // leading keys without a position

  const int32_t* delta;  // delta[x + reach]: row of the full table for distance x = i - j
  int64_t reach;
  int64_t low_end;     // delta is constant for x <= low_end ...
  int64_t high_start;  // ... and for x >= high_start
  int64_t smooth;      // delta never falls and rises by at most 1 per token

  const uint8_t* key_mask;    // (batch, nk), 0 = masked, or null
  const uint8_t* query_mask;  // (batch, nq), 0 = padding row, or null
  const uint8_t* pair_mask;   // (batch, 1 or heads, nq, nk), 0 = masked, or null
  int64_t key_mask_stride_b, query_mask_stride_b;
  int64_t pair_mask_stride_b, pair_mask_stride_h, pair_mask_stride_q;
  const int32_t* cu_seqlens;  // (batch + 1), or null

  double scale;
  int64_t dropout_threshold;  // 0 = no dropout; a 16-bit draw below it drops the probability
  double dropout_scale;       // factor on the kept ones
  int64_t seed;
};

// A linear layer: out (tokens, out_features) = x (tokens, in_features) times weight (out_features, in_features) + bias.
// Float operands may lie transposed in memory, for the products of its gradients.
struct LinearParams {
  int64_t abi_version;
  int64_t tokens, in_features, out_features;  // out_features is a multiple of 16
  int64_t dtype;                              // DataType of everything: float32, or bfloat16 with instructions for it
  int64_t gelu;                               // 1: the exact GELU of it
  int64_t threads;
  int64_t x_transposed, weight_transposed;  // 1: as (in_features, tokens), (in_features, out_features)
  const void* x;                            // all contiguous
  const void* weight;
  const void* bias;  // (out_features), or null
  void* out;
};

// Dropout of hidden states and the residual that may follow: out = x * keep * scale + residual, all contiguous.
struct DropoutParams {
  int64_t abi_version;
  int64_t count;  // elements
  int64_t threads;
  int64_t x_dtype, residual_dtype, out_dtype;
  const void* x;
  const void* residual;  // or null
  void* out;
  int64_t threshold, seed;  // as in AttentionParams
  double scale;
};

// What one instruction-set variant of kernel.cpp offers to dispatch.cpp.
struct Variant {
  const char* name;
  int64_t vector_width;  // floats per vector register
  int (*forward)(const AttentionParams&);
  int (*backward)(const AttentionParams&);
  int64_t (*prepared_bytes)(const AttentionParams&);
  int (*prepare)(const AttentionParams&, void*);
  int (*linear)(const LinearParams&);
  int (*dropout)(const DropoutParams&);
  void (*checksum)(const char* data, int64_t bytes, const char* key, uint64_t* result);
  double (*gemm_rate)(int64_t dtype, int64_t repeats);
};

// Status codes of forward and backward.
enum Status : int { kOk = 0, kOutOfMemory = 1, kBadAbi = 2, kUnsupported = 3, kBadPrepared = 4 };

}  // namespace dk
