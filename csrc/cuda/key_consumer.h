// A consumer of the backward: one warpgroup that holds 64 keys and the gradients of keys and values, and meets tile by
// tile the queries that the producer brings. Rows are keys, columns queries: see backward_schedule.h.
#pragma once
#include "dropout.h"
#include "gradient_tiles.h"
#include "query_producer.h"
#include "reduction.h"
#include "softmax.h"

namespace dk {

template <class Element, int D, bool kPair, bool kDropout>
class KeyConsumer {
  using L = BackwardLayout<D>;
  static constexpr int kSteps = D / kStep;      // products over the head dimension
  static constexpr int kOver = kTile / kStep;   // and over the pairs of a tile

 public:
  DK_DEVICE KeyConsumer(const BackwardParams& p, const Place& place, uint32_t shared, int consumer, int thread, int warp)
      : p_(p), place_(place), shared_(shared), own_(shared + L::kConsumer + consumer * L::kConsumerBytes),
        consumer_(consumer), thread_(thread), lane_(thread, warp), bias_(lane_, own_ + L::kFrame),
        gradients_(lane_, own_ + L::kScores, own_ + L::kRotated, own_ + L::kColumns), qk_scale_((float)p.qk_scale) {
    // See `GradientTiles`: what is 0 in `columns` stays so.
    for (int i = 0; i < 2 * L::kPairBytes; i += kWarpgroup * 16) {
      store_shared_4(own_ + L::kColumns + i + thread * 16, 0u, 0u, 0u, 0u);
    }
    if (consumer == 0 && thread < 8 * kRowBytes / 16) {
      const uint32_t one = Element::pack(1.0f, 1.0f);
      store_shared_4(shared + L::kOnes + thread * 16, one, one, one, one);
    }
    fence_async();
  }

  DK_DEVICE void run(const KeyBlock& block, int number) {
    load_keys(block);
    DK_UNROLL
    for (int i = 0; i < 32; i++) dk_[i] = dv_[i] = 0.0f;
    StageInfo info = next_stage();
    while (info.zone != kEnd) {
      if (info.zone == kNearFirst) near_run(info, block);
      else far_zone(info, number);
    }
    release_stage();
    finish();
  }

  // Wait for the last sums.
  DK_DEVICE void leave() const {
    if (thread_ == 0) reduce_wait();
  }

 private:
  // ---- Pipeline

  DK_DEVICE StageInfo next_stage() {
    barrier_wait(shared_ + L::kStageFull + stage_.entry * 8, stage_.parity);
    StageInfo info;
    uint32_t first, zone;
    load_shared_4(shared_ + L::kStageInfo + stage_.entry * 16, info.valid_low, info.valid_high, first, zone);
    info.first_key = (int)first, info.zone = (int)zone;
    return info;
  }
  DK_DEVICE uint32_t queries() const { return shared_ + L::kQueries + stage_.entry * L::kTileBytes; }
  DK_DEVICE uint32_t douts() const { return shared_ + L::kDouts + stage_.entry * L::kTileBytes; }
  DK_DEVICE uint32_t statistics() const {
    return shared_ + L::kStatistics + stage_.entry * L::kStatisticsBytes + 2 * lane_.t * 4;
  }
  DK_DEVICE void release_stage() {
    if ((thread_ & 31) == 0) barrier_arrive(shared_ + L::kStageEmpty + stage_.entry * 8);
    stage_.advance();
  }
  DK_DEVICE void wait_slot(const RingPosition<L::kSlots>& slot) const {
    barrier_wait(shared_ + L::kSlotFull + slot.entry * 8, slot.parity);
  }
  DK_DEVICE void release_slot() {
    if ((thread_ & 31) == 0) barrier_arrive(shared_ + L::kSlotEmpty + high_.entry * 8);
    high_.advance();
  }
  DK_DEVICE uint32_t row_block(int entry) const { return shared_ + L::kPosRow + entry * L::kTileBytes; }
  DK_DEVICE uint32_t column_block(int entry) const { return shared_ + L::kPosColumn + entry * L::kTileBytes; }
  DK_DEVICE void sync_consumer() const { sync_threads(kConsumerBarrier + consumer_, kWarpgroup); }
  DK_DEVICE void sync_consumers() const { sync_threads(kConsumersBarrier, L::kConsumerThreads); }

  // ---- Zones

  // Meet the queries of a far zone: plain attention with another query q + b, and a constant of the query, q . a.
  DK_DEVICE void far_zone(StageInfo& info, int number) {
    const int zone = info.zone;
    await_sums();
    store_keys(zone);
    if (zone != kPrefix) keep_column_sums();
    DK_UNROLL
    for (int i = 0; i < 4; i++) row_sums_[i] = 0.0f;
    while (info.zone == zone) {
      far_tile(info);
      info = next_stage();
    }
    if (zone != kPrefix) store_far_sums(zone, number);
  }

  DK_DEVICE void far_tile(const StageInfo& info) {
    float score[32], dp[32];
    zero_padding(info);
    product_fence();
    multiply_rows<false>(score, k_, queries());
    product_commit();
    multiply_rows<false>(dp, v_, douts());
    product_commit();
    product_wait<1>();
    uint32_t weights[16], ds[16];
    const uint32_t kept = probabilities(score, info, weights);
    product_fence();
    add_transposed(dv_, weights, douts());
    product_commit();
    product_wait<1>();
    score_gradients(score, dp, kept, ds);
    gradients_.store_scores(ds);
    fence_async();
    if (thread_ == 0) reduce_wait();
    sync_consumer();
    float dq[32];
    product_fence();
    add_transposed(dk_, ds, queries());
    add_row_sums(ds);
    multiply_scores(dq);
    product_commit();
    product_wait<0>();
    release_stage();
    add_to_queries(dq, info.first_key);
  }

  // Meet neighbouring near tiles, the first one of which is the current one.
  DK_DEVICE void near_run(StageInfo& info, const KeyBlock& block) {
    DK_UNROLL
    for (int i = 0; i < L::kConsumers - 1; i++) {
      if (i < L::kConsumers - 1 - consumer_) release_slot();
    }
    wait_slot(high_);
    await_sums();
    store_keys(kNear);
    // No tile before has begun the first block.
    for (int i = 0; i < L::kPairBytes; i += kWarpgroup * 16) {
      store_shared_4(gradients_.complete() + i + thread_ * 16, 0u, 0u, 0u, 0u);
    }
    DK_UNROLL
    for (int i = 0; i < 32; i++) dcolumns_[i] = 0.0f;
    block_ = ((int)p_.table_offset + block.first_key + consumer_ * kTile - place_.prefix - info.first_key) / kTile;
    near_tile(info);
    info = next_stage();
    while (info.zone == kNear) {
      near_tile(info);
      info = next_stage();
    }
    finish_near();
    DK_UNROLL
    for (int i = 0; i < L::kConsumers; i++) {
      if (i <= consumer_) release_slot();
    }
  }

  DK_DEVICE void near_tile(const StageInfo& info) {
    RingPosition<L::kSlots> low = high_;
    low.advance();
    wait_slot(low);
    zero_padding(info);
    float score[32], dp[32];
    load_bias(score, low.entry);
    product_fence();
    multiply_rows<true>(score, k_, queries());
    product_commit();
    multiply_rows<false>(dp, v_, douts());
    product_commit();
    product_wait<1>();
    uint32_t weights[16], ds[16];
    const uint32_t kept = probabilities(score, info, weights);
    product_fence();
    add_transposed(dv_, weights, douts());
    product_commit();
    product_wait<1>();
    score_gradients(score, dp, kept, ds);
    sync_consumer();  // every warp has loaded its bias from what the gradients overwrite
    gradients_.store_scores(ds);
    gradients_.store_rotated(ds);
    gradients_.store_columns(ds);
    fence_async();
    sync_consumer();
    {
      float dq[32], drows[32];
      product_fence();
      add_transposed(dk_, ds, queries());
      multiply_scores(dq);
      add_blocks(dq, low.entry);
      add_rotated(drows);
      add_columns<true>(dcolumns_, 0);
      product_commit();
      product_wait<0>();
      sync_consumer();  // every warp's products have read what the sums overwrite
      stage_rows(drows);
      add_to_queries(dq, info.first_key);
    }
    if (thread_ == 0) reduce_wait_read();
    sync_consumers();
    stage_columns();
    product_fence();
    add_columns<false>(dcolumns_, L::kPairBytes);
    product_commit();
    product_wait<0>();
    release_stage();
    release_slot();
    gradients_.advance();
    block_--;
  }

  // What the low block of the last tile of a run has: no tile follows.
  DK_DEVICE void finish_near() {
    const uint32_t nothing[16] = {};
    await_sums();
    gradients_.store_rotated(nothing);
    fence_async();
    sync_consumer();
    float drows[32];
    product_fence();
    add_rotated(drows);
    product_commit();
    product_wait<0>();
    sync_consumer();
    stage_rows(drows);
    stage_columns();
  }

  // ---- Scores

  // Load what both tables add to the scores of a near tile.
  DK_DEVICE void load_bias(float (&score)[32], int low) {
    await_sums();
    const uint32_t half = bias_.half(own_ + L::kScores, gradients_.begun());
    {
      float high_rows[32], low_rows[32];
      product_fence();
      multiply_rows<false>(high_rows, k_, row_block(high_.entry));
      multiply_rows<false>(low_rows, k_, row_block(low));
      product_commit();
      product_wait<0>();
      bias_.store_rows(high_rows, low_rows, half);
    }
    {
      float high_columns[32], low_columns[32];
      product_fence();
      multiply_columns(high_columns, column_block(high_.entry));
      multiply_columns(low_columns, column_block(low));
      product_commit();
      product_wait<0>();
      bias_.store_p2c(high_columns, low_columns);
    }
    sync_consumer();
    bias_.load(score, half);
  }

  // Turn scores into probabilities, and those that dropout keeps into an operand; return which ones these are.
  DK_DEVICE uint32_t probabilities(float (&score)[32], const StageInfo& info, uint32_t (&weights)[16]) const {
    if (kPair) PairMask(p_, place_).apply_transposed(score, keys_, info.first_key, lane_);
    if (is_partial_) {
      DK_UNROLL
      for (int i = 0; i < 32; i++) {
        if (!is_valid_[(i >> 1) & 1]) score[i] = minus_infinity();
      }
    }
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      float shift[2];
      load_shared_2(statistics() + 8 * n * 4, shift[0], shift[1]);
      DK_UNROLL
      for (int i = 0; i < 4; i++) {
        float& x = score[4 * n + i];
        x = exp2_fast(multiply_add(x, qk_scale_, shift[i & 1]));
      }
    }
    if (!kDropout) return to_operand<Element>(score, weights), ~0u;
    const uint32_t kept = kept_pairs(
        load_global(p_.seed), (uint32_t)(place_.batch * (int)p_.heads + place_.head), first_key_, info.first_key,
        (uint32_t)p_.dropout_threshold, lane_);
    float dropped[32];
    DK_UNROLL
    for (int i = 0; i < 32; i++) dropped[i] = kept >> i & 1 ? score[i] : 0.0f;
    to_operand<Element>(dropped, weights);
    return kept;
  }

  // Turn probabilities p and gradients dp of dropped ones into gradients of scores, p (dp - delta), as an operand.
  DK_DEVICE void score_gradients(const float (&p)[32], float (&dp)[32], uint32_t kept, uint32_t (&ds)[16]) const {
    const float keep_scale = (float)p_.keep_scale;
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      float delta[2];
      load_shared_2(statistics() + kTile * 4 + 8 * n * 4, delta[0], delta[1]);
      DK_UNROLL
      for (int i = 0; i < 4; i++) {
        float& x = dp[4 * n + i];
        if (kDropout) x = kept >> (4 * n + i) & 1 ? x * keep_scale : 0.0f;
        x = p[4 * n + i] * (x - delta[i & 1]);
      }
    }
    to_operand<Element>(dp, ds);
  }

  // Zero queries without a softmax, so that a NaN there meets no zero probability.
  DK_DEVICE void zero_padding(const StageInfo& info) const {
    if (!is_partial(info)) return;
    const int thread = consumer_ * kWarpgroup + thread_;
    zero_masked_rows<D, L::kConsumerThreads>(queries(), info, thread);
    zero_masked_rows<D, L::kConsumerThreads>(douts(), info, thread);
    sync_consumers();
  }

  // ---- Products

  // Multiply rows in registers with a tile of tokens or a block of a table.
  template <bool kAccumulate>
  DK_DEVICE static void multiply_rows(float (&d)[32], const uint32_t (&rows)[4 * kSteps], uint32_t tile) {
    const uint32_t start = operand_start(tile);
    Element::template product<kAccumulate, false>(d, rows, columns_inside<kTile>(start, 0));
    DK_UNROLL
    for (int k = 1; k < kSteps; k++) {
      Element::template product<true, false>(d, rows + 4 * k, columns_inside<kTile>(start, k));
    }
  }

  // Multiply the queries of the current tile, as rows, with a table block.
  DK_DEVICE void multiply_columns(float (&d)[32], uint32_t block) const {
    const uint32_t rows = operand_start(queries()), columns = operand_start(block);
    Element::template product<false>(d, columns_inside<kTile>(rows, 0), columns_inside<kTile>(columns, 0));
    DK_UNROLL
    for (int k = 1; k < kSteps; k++) {
      Element::template product<true>(d, columns_inside<kTile>(rows, k), columns_inside<kTile>(columns, k));
    }
  }

  // Add the product of pairs in registers with a tile of queries.
  DK_DEVICE static void add_transposed(float (&d)[32], const uint32_t (&pairs)[16], uint32_t tile) {
    const uint32_t start = operand_start(tile);
    DK_UNROLL
    for (int k = 0; k < kOver; k++) {
      Element::template product<true, true>(d, pairs + 4 * k, rows_inside<kTile>(start, 0, k));
    }
  }

  DK_DEVICE void add_row_sums(const uint32_t (&ds)[16]) {
    const uint64_t ones = descriptor(operand_start(shared_ + L::kOnes));
    DK_UNROLL
    for (int k = 0; k < kOver; k++) Element::product_of_8(row_sums_, ds + 4 * k, ones);
  }

  // Multiply a tile of pairs with a tile of 64 rows that runs along its columns, or, kFirstTransposed, along its rows.
  template <bool kAccumulate, bool kFirstTransposed>
  DK_DEVICE static void multiply_pairs(float (&d)[32], uint32_t pairs, uint32_t tile) {
    const uint32_t a = operand_start(pairs), b = operand_start(tile);
    DK_UNROLL
    for (int k = 0; k < kOver; k++) {
      const uint64_t first = kFirstTransposed ? rows_inside<kTile>(a, 0, k) : columns_inside<kTile>(a, k);
      const uint64_t second = rows_inside<kTile>(b, 0, k);
      if (kAccumulate || k > 0) Element::template product<true, kFirstTransposed, true>(d, first, second);
      else Element::template product<false, kFirstTransposed, true>(d, first, second);
    }
  }

  // The keys' share of the gradient of the queries, and that of the blocks of the columns' table.
  DK_DEVICE void multiply_scores(float (&dq)[32]) const {
    multiply_pairs<false, true>(dq, own_ + L::kScores, own_ + L::kKeys);
  }
  DK_DEVICE void add_blocks(float (&dq)[32], int low) const {
    multiply_pairs<true, false>(dq, own_ + L::kColumns, column_block(high_.entry));
    multiply_pairs<true, false>(dq, own_ + L::kColumns + L::kPairBytes, column_block(low));
  }
  // What the complete block of the rows' table adds to the gradient of the keys, and the gradient of the block.
  DK_DEVICE void add_rotated(float (&drows)[32]) {
    multiply_pairs<true, false>(dk_, gradients_.complete(), row_block(high_.entry));
    multiply_pairs<false, true>(drows, gradients_.complete(), own_ + L::kKeys);
  }
  template <bool kAccumulate>
  DK_DEVICE void add_columns(float (&d)[32], int tile) const {
    multiply_pairs<kAccumulate, true>(d, own_ + L::kColumns + tile, queries());
  }

  // ---- Sums

  // Until the copy engine has done this consumer's sums and the other consumer has read its half, the frame and the
  // gradients of the tile before must stay.
  DK_DEVICE void await_sums() const {
    if (thread_ == 0) reduce_wait();
    sync_consumers();
  }

  // Both consumers exchange halves of their sums over keys, so that each adds half of the block's to global memory. The
  // two halves of the frame take turns: what this consumer adds now lies where its neighbour read before.
  DK_DEVICE void add_to_queries(float (&dq)[32], int first_query) {
    const uint32_t frame = own_ + L::kFrame, neighbour = frame + (consumer_ ? -1 : 1) * L::kConsumerBytes;
    const uint32_t given = turn_, summed = kHalfBytes - turn_;
    turn_ = summed;
    if (consumer_ == 0) stage_half<4>(dq, frame + given, thread_);
    else stage_half<0>(dq, frame + given, thread_);
    sync_consumers();
    if (consumer_ == 0) {
      add_half<0>(dq, neighbour + given, thread_);
      stage_half<0>(dq, frame + summed, thread_);
    } else {
      add_half<4>(dq, neighbour + given, thread_);
      stage_half<4>(dq, frame + summed, thread_);
    }
    fence_async();
    sync_consumer();
    if (thread_ == 0) {
      const int64_t first_tile =
          p_.cu_seqlens ? place_.first_token / kTile + place_.batch : place_.batch * p_.row_tiles;
      const int64_t tile = (first_tile + first_query / kTile) * p_.heads + place_.head;
      reduce_add(p_.dq_sums + (2 * tile + consumer_) * kHalfFloats, frame + summed, kHalfBytes);
      reduce_commit();
    }
  }

  DK_DEVICE float* table_sum(int table, int block) const {
    float* copy = p_.dtables + place_.batch * p_.dtables_stride_b + consumer_ * p_.dtables_stride_consumer;
    return copy + ((table * p_.heads + place_.head) * (p_.table_rows / kTile) + block) * 2 * kHalfFloats;
  }

  // Add the gradient of the complete block of pos_query, by way of the gradients of scores: they are not read any more.
  DK_DEVICE void stage_rows(const float (&drows)[32]) const {
    const uint32_t first = own_ + L::kScores, second = gradients_.complete();
    stage_half<0>(drows, first, thread_);
    stage_half<4>(drows, second, thread_);
    fence_async();
    sync_consumer();
    if (thread_ == 0) {
      float* sum = table_sum(1, block_);
      reduce_add(sum, first, kHalfBytes);
      reduce_add(sum + kHalfFloats, second, kHalfBytes);
      reduce_commit();
    }
  }

  // Add the gradient of the high block of pos_key, by way of the frame.
  DK_DEVICE void stage_columns() const {
    stage_half<0>(dcolumns_, own_ + L::kFrame, thread_);
    stage_half<4>(dcolumns_, own_ + L::kFrame + kHalfBytes, thread_);
    fence_async();
    sync_consumer();
    if (thread_ == 0) {
      reduce_add(table_sum(0, block_), own_ + L::kFrame, 2 * kHalfBytes);
      reduce_commit();
    }
  }

  // ---- Sums of a far zone

  // This thread's share of the sums over rows of an accumulator, for columns 8 n + 2 t + e.
  DK_DEVICE static void add_rows(const float (&d)[32], float (&sums)[16], float factor) {
    DK_UNROLL
    for (int i = 0; i < 16; i++) sums[i] += factor * (d[4 * (i >> 1) + (i & 1)] + d[4 * (i >> 1) + 2 + (i & 1)]);
  }

  // Keep what the gradients of the keys are before a far zone, in memory that only near tiles use; each thread its own.
  DK_DEVICE void keep_column_sums() const {
    float sums[16] = {};
    add_rows(dk_, sums, -1.0f);
    DK_UNROLL
    for (int i = 0; i < 4; i++) {
      const float* x = sums + 4 * i;
      store_shared_floats(own_ + L::kRotated + i * kChunkBytes + thread_ * 16, x[0], x[1], x[2], x[3]);
    }
  }

  // Store what the zone adds to the gradients of the end rows of both tables. With s_j the sums of ds over its queries,
  // that of pos_query is the sum of s_j k_j; that of pos_key the sum of ds_ij q_i, which is what the zone adds to the
  // gradients of all keys, the sum of ds_ij (q_i + b), less that of s_j b.
  DK_DEVICE void store_far_sums(int zone, int number) {
    float of_keys[16], of_rows[16] = {};
    DK_UNROLL
    for (int i = 0; i < 4; i++) {
      float* x = of_keys + 4 * i;
      load_shared_floats(own_ + L::kRotated + i * kChunkBytes + thread_ * 16, x[0], x[1], x[2], x[3]);
    }
    add_rows(dk_, of_keys, 1.0f);
    const uint16_t* b = end_row(p_.pos_query_rows, zone);
    const float s[2] = {row_sums_[0], row_sums_[2]};
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      float b0, b1;
      Element::unpack(load_global(reinterpret_cast<const uint32_t*>(b + 8 * n)), b0, b1);
      of_keys[2 * n] -= (s[0] + s[1]) * b0, of_keys[2 * n + 1] -= (s[0] + s[1]) * b1;
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float k0, k1;
        Element::unpack(k_[2 * n + h], k0, k1);
        of_rows[2 * n] += s[h] * k0, of_rows[2 * n + 1] += s[h] * k1;
      }
    }
    await_sums();
    store_columns_of(of_keys, 0, zone, number);
    store_columns_of(of_rows, 1, zone, number);
  }

  DK_DEVICE void store_columns_of(const float (&sums)[16], int table, int zone, int number) const {
    const uint32_t scratch = own_ + L::kFrame + table * 4 * D * 4;
    DK_UNROLL
    for (int i = 0; i < 16; i++) {
      float x = sums[i] + shuffle_xor(sums[i], 4);
      x += shuffle_xor(x, 8);
      x += shuffle_xor(x, 16);
      if (lane_.g == 0) store_shared(scratch + (lane_.w * D + 8 * (i >> 1) + 2 * lane_.t + (i & 1)) * 4, x);
    }
    sync_consumer();
    if (thread_ >= D / 2) return;
    float sum[2] = {0.0f, 0.0f};
    DK_UNROLL
    for (int w = 0; w < 4; w++) {
      float x, y;
      load_shared_2(scratch + (w * D + 2 * thread_) * 4, x, y);
      sum[0] += x, sum[1] += y;
    }
    const int64_t blocks = p_.batch * p_.key_blocks * L::kConsumers;
    const int64_t block = (place_.batch * p_.key_blocks + number) * L::kConsumers + consumer_;
    const int64_t part = (2 * table + (zone == kRight)) * p_.heads + place_.head;
    float* target = p_.far_sums + (part * blocks + block) * D + 2 * thread_;
    store_global(target, sum[0]);
    store_global(target + 1, sum[1]);
  }

  // ---- Keys

  // The row of a table that all pairs of a far zone read, from this lane's columns on.
  DK_DEVICE const uint16_t* end_row(const void* rows, int zone) const {
    const int64_t row = place_.head * p_.table_rows + (zone == kLeft ? p_.table_rows - 1 : 0);
    return static_cast<const uint16_t*>(rows) + row * D + 2 * lane_.t;
  }

  DK_DEVICE void load_keys(const KeyBlock& block) {
    first_key_ = block.first_key + consumer_ * kTile;
    bool all = true;
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      const int key = first_key_ + 16 * lane_.w + 8 * h + query_of_row(lane_.g);
      keys_[h] = key;
      is_there_[h] = is_valid_[h] = key >= block.start && key < block.stop;
      if (is_valid_[h] && p_.key_mask) {
        is_valid_[h] = load_global(p_.key_mask + place_.batch * p_.key_mask_stride_b + key) != 0;
      }
      all &= is_valid_[h];
    }
    is_partial_ = ballot(all) != 0xffffffffu;
    load_fragments(k_, p_.k, p_.k_stride_b, p_.k_stride_h, p_.k_stride_n);
    load_fragments(v_, p_.v, p_.v_stride_b, p_.v_stride_h, p_.v_stride_n);
  }

  // Load rows as the first operand of products; those of keys that may not be attended to are 0.
  DK_DEVICE void load_fragments(
      uint32_t (&rows)[4 * kSteps], const void* from, int64_t stride_b, int64_t stride_h, int64_t stride_n) const {
    const int batch = p_.cu_seqlens ? 0 : place_.batch;
    const uint16_t* base = static_cast<const uint16_t*>(from) + batch * stride_b + place_.head * stride_h + 2 * lane_.t;
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      const uint16_t* row = base + (int64_t)(place_.first_token + keys_[h]) * stride_n;
      DK_UNROLL
      for (int half = 0; half < 2 * kSteps; half++) {
        rows[2 * half + h] = is_valid_[h] ? load_global(reinterpret_cast<const uint32_t*>(row + 8 * half)) : 0;
      }
    }
  }

  // Store the keys as an operand of the products that sum over keys, plus, in a far zone, the row a of its distances:
  // the sum of ds_ij (k_j + a) is what the zone adds to the gradients of queries.
  DK_DEVICE void store_keys(int zone) const {
    const bool far = zone == kLeft || zone == kRight;
    const uint32_t target = own_ + L::kKeys + (16 * lane_.w + lane_.g) * kRowBytes + lane_.g * 16 + lane_.t * 4;
    DK_UNROLL
    for (int n = 0; n < 2 * kSteps; n++) {
      float a0 = 0.0f, a1 = 0.0f;
      if (far) {
        const uint16_t* a = end_row(p_.pos_key_rows, zone);
        Element::unpack(load_global(reinterpret_cast<const uint32_t*>(a + 8 * n)), a0, a1);
      }
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float k0, k1;
        Element::unpack(k_[2 * n + h], k0, k1);
        store_shared((target ^ n * 16) + h * 8 * kRowBytes, Element::pack(k0 + a0, k1 + a1));
      }
    }
    fence_async();
  }

  // ---- Results

  DK_DEVICE void finish() const {
    const int batch = p_.cu_seqlens ? 0 : place_.batch;
    const float scale = (float)p_.scale, keep_scale = (float)p_.keep_scale;
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      if (!is_there_[h]) continue;
      const int64_t token = batch * p_.nk + place_.first_token + keys_[h];
      const int64_t at = (token * p_.heads + place_.head) * D + 2 * lane_.t;
      uint16_t *dk = static_cast<uint16_t*>(p_.dk) + at, *dv = static_cast<uint16_t*>(p_.dv) + at;
      const float* dmean = p_.dmean + ((int64_t)batch * p_.heads + place_.head) * D + 2 * lane_.t;
      DK_UNROLL
      for (int n = 0; n < 8; n++) {
        const int i = 4 * n + 2 * h;
        float x = dv_[i] * keep_scale, y = dv_[i + 1] * keep_scale;
        if (p_.dmean) x += load_global(dmean + 8 * n), y += load_global(dmean + 8 * n + 1);
        store_global(reinterpret_cast<uint32_t*>(dv + 8 * n), Element::pack(x, y));
        store_global(reinterpret_cast<uint32_t*>(dk + 8 * n), Element::pack(dk_[i] * scale, dk_[i + 1] * scale));
      }
    }
  }

  const BackwardParams& p_;
  const Place& place_;
  const uint32_t shared_, own_;
  const int consumer_, thread_;
  const Lane lane_;
  TileBias bias_;
  GradientTiles gradients_;
  const float qk_scale_;
  int first_key_, keys_[2];
  bool is_there_[2], is_valid_[2], is_partial_;  // of the two keys of this thread; whether some of its warp's are not valid
  RingPosition<L::kStages> stage_;
  RingPosition<L::kSlots> high_;  // the slot of this consumer's high block
  int block_ = 0;                 // the number of that block
  uint32_t turn_ = 0;             // which half of the frame this consumer gives its neighbour
  uint32_t k_[4 * kSteps], v_[4 * kSteps];
  float dk_[32], dv_[32];
  float dcolumns_[32];            // gradient of the high block of pos_key, so far
  float row_sums_[4];             // sums of ds over the queries of a far zone: rows g, g, g + 8, g + 8
};

}  // namespace dk
