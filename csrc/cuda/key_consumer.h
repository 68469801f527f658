// A consumer of the backward: one warpgroup that holds 64 keys and the gradients of keys and values, and meets tile by
// tile the queries that the producer brings. Rows are keys, columns queries: see backward_schedule.h.
#pragma once
#include "dropout.h"
#include "gradient_tiles.h"
#include "key_rows.h"
#include "query_producer.h"
#include "softmax.h"

namespace dk {

template <class Element, int D, bool kPair, bool kDropout>
class KeyConsumer {
  using L = BackwardLayout<D>;
  static constexpr int kSteps = D / kStep;      // products over the head dimension
  static constexpr int kOver = kTile / kStep;   // and over the pairs of a tile

 public:
  DK_DEVICE KeyConsumer(const BackwardParams& p, uint32_t shared, int consumer, int thread)
      : p_(p), shared_(shared), own_(shared + L::kConsumer + consumer * L::kConsumerBytes), consumer_(consumer),
        thread_(thread), keys_(p, shared, consumer, thread), sums_(p, shared, consumer, thread) {
    // See `GradientTiles`: what is 0 in `columns` stays so.
    for (int i = 0; i < 2 * L::kPairBytes; i += kWarpgroup * 16) {
      store_shared_4(own_ + L::kColumns + i + thread * 16, 0u, 0u, 0u, 0u);
    }
    if (thread < 8 * kRowBytes / 16 && consumer == 0) {
      const uint32_t one = Element::pack(1.0f, 1.0f);
      store_shared_4(shared + L::kOnes + thread * 16, one, one, one, one);
    }
    fence_async();
    sums_.sync_consumers();
  }

  // Meet all queries with one block of keys; return its number.
  DK_DEVICE int run() {
    Visit visit = next_stage();
    keys_.begin(visit.number());
    sums_.begin(visit.number());
    keys_.load_v(v_, visit.number());
    DK_UNROLL
    for (int i = 0; i < 32; i++) dk_[i] = dv_[i] = 0.0f;
    while (visit.zone() != kEnd) visit = visit.zone() == kNearFirst ? near_run() : far_zone(visit);
    keys_.store_gradients(dk_, dv_, visit.number());
    sync_warp();  // every lane has read the visit
    release_stage();
    return visit.number();
  }

  // Wait for the last sums.
  DK_DEVICE void leave() const { sums_.wait(); }

 private:
  // ---- Pipeline

  // Wait for the next tile of queries. The rest of its `StageInfo` is read where it is needed, since registers are scarce.
  DK_DEVICE Visit next_stage() const {
    barrier_wait(shared_ + L::kStageFull + stage_.entry() * 8, stage_.parity());
    return visit();
  }
  DK_DEVICE uint32_t stage_info() const { return shared_ + L::kStageInfo + stage_.entry() * 16; }
  DK_DEVICE Visit visit() const { return Visit{(int)load_shared(stage_info() + 12)}; }
  DK_DEVICE int first_query() const { return (int)load_shared(stage_info() + 8); }
  DK_DEVICE uint32_t queries() const { return shared_ + L::kQueries + stage_.entry() * L::kTileBytes; }
  DK_DEVICE uint32_t douts() const { return shared_ + L::kDouts + stage_.entry() * L::kTileBytes; }
  DK_DEVICE uint32_t statistics() const {
    return shared_ + L::kStatistics + stage_.entry() * L::kStatisticsBytes + 8 * (thread_ & 3);
  }
  DK_DEVICE void release_stage() {
    if ((thread_ & 31) == 0) barrier_arrive(shared_ + L::kStageEmpty + stage_.entry() * 8);
    stage_.count++;
  }
  DK_DEVICE void wait_slot(const RingCounter<L::kSlots>& slot) const {
    barrier_wait(shared_ + L::kSlotFull + slot.entry() * 8, slot.parity());
  }
  DK_DEVICE void release_slot() {
    if ((thread_ & 31) == 0) barrier_arrive(shared_ + L::kSlotEmpty + high_.entry() * 8);
    high_.count++;
  }
  // Which half of the frame this consumer gives its neighbour.
  DK_DEVICE int turn() const { return (int)stage_.count & 1; }
  DK_DEVICE uint32_t row_block(int entry) const { return shared_ + L::kPosRow + entry * L::kTileBytes; }
  DK_DEVICE uint32_t column_block(int entry) const { return shared_ + L::kPosColumn + entry * L::kTileBytes; }
  // Where the block of gradients by distance lies that is complete after this tile, and the one that the next completes.
  DK_DEVICE uint32_t complete() const { return own_ + L::kRotated + current(); }
  DK_DEVICE uint32_t begun() const { return own_ + L::kRotated + (current() ^ L::kPairBytes); }
  DK_DEVICE uint32_t current() const { return high_.count % 2 * L::kPairBytes; }
  // 0, though no compiler knows: a tile's first query is a multiple of 64. What is added to it must be computed where it is
  // used. Computed once and kept, addresses and keys of dropout would take the registers of the products.
  DK_DEVICE int opaque_zero() const { return first_query() & (kTile - 1); }
  DK_DEVICE Lane lane() const {
    const int thread = thread_ + opaque_zero();
    return Lane(thread, thread / 32);
  }

  // ---- Zones

  // Meet the queries of a far zone: plain attention with another query q + b, and a constant of the query, q . a.
  // Returns the visit that follows.
  DK_DEVICE Visit far_zone(Visit visit) {
    uint32_t k[4 * kSteps];
    float row_sums[4] = {};  // sums of ds over the queries of the zone: rows g, g, g + 8, g + 8
    keys_.load_k(k, visit.number());
    sums_.await_all();
    keys_.store_k(k, visit.zone());
    if (visit.zone() != kPrefix) keys_.keep(dk_);
    Visit next;
    do {
      far_tile(k, row_sums);
      next = next_stage();
    } while (next.word == visit.word);
    if (visit.zone() != kPrefix) {
      sums_.await_all();
      keys_.store_far_sums(dk_, row_sums, k, visit);
    }
    return next;
  }

  DK_DEVICE void far_tile(const uint32_t (&k)[4 * kSteps], float (&row_sums)[4]) {
    float score[32], dp[32];
    zero_padding();
    const Draws draws = draw();
    product_fence();
    multiply_rows<false>(score, k, queries());
    product_commit();
    multiply_rows<false>(dp, v_, douts());
    product_commit();
    product_wait<1>();
    uint32_t weights[16], ds[16];  // the products read both until the last wait
    probabilities(score, draws, weights);
    product_fence();
    add_transposed(dv_, weights, douts());
    product_commit();
    product_wait<1>();
    score_gradients(score, dp, draws, ds);
    store_scores(ds, lane(), own_ + L::kScores);
    fence_async();
    sums_.wait();
    sums_.sync_consumer();
    float dq[32];
    product_fence();
    add_transposed(dk_, ds, queries());
    add_row_sums(row_sums, ds);
    multiply<false, true, true>(dq, own_ + L::kScores, own_ + L::kKeys);
    product_commit();
    product_wait<0>();
    sums_.add_to_queries(dq, first_query(), turn());
    release_stage();
  }

  // Meet neighbouring near tiles, the first one of which is the current one.
  DK_DEVICE Visit near_run() {
    DK_UNROLL
    for (int i = 0; i < L::kConsumers - 1; i++) {
      if (i < L::kConsumers - 1 - consumer_) release_slot();
    }
    wait_slot(high_);
    sums_.await_all();
    {
      uint32_t k[4 * kSteps];
      keys_.load_k(k, visit().number());
      keys_.store_k(k, kNear);
    }
    // No tile before has begun the first block.
    for (int i = 0; i < L::kPairBytes; i += kWarpgroup * 16) {
      store_shared_4(complete() + i + thread_ * 16, 0u, 0u, 0u, 0u);
    }
    fence_async();
    float dcolumns[32];  // gradient of the high block of pos_key, so far
    DK_UNROLL
    for (int i = 0; i < 32; i++) dcolumns[i] = 0.0f;
    int last;
    Visit next;
    do {
      last = first_query();
      near_tile(dcolumns);
      next = next_stage();
    } while (next.zone() == kNear);
    finish_near(dcolumns, last + kTile);
    DK_UNROLL
    for (int i = 0; i < L::kConsumers; i++) {
      if (i <= consumer_) release_slot();
    }
    return next;
  }

  DK_DEVICE void near_tile(float (&dcolumns)[32]) {
    const RingCounter<L::kSlots> low = high_.next();
    wait_slot(low);
    zero_padding();
    const Draws draws = draw();
    uint32_t ds[16];
    {
      float score[32], dp[32];
      load_bias(score, low.entry());
      product_fence();
      multiply<true, false, false>(score, own_ + L::kKeys, queries());
      product_commit();
      multiply_rows<false>(dp, v_, douts());
      product_commit();
      product_wait<1>();
      uint32_t weights[16];
      probabilities(score, draws, weights);
      product_fence();
      add_transposed(dv_, weights, douts());
      product_commit();
      product_wait<0>();
      score_gradients(score, dp, draws, ds);
    }
    sums_.sync_consumer();  // every warp has loaded its bias from what the gradients overwrite
    {
      const Lane where = lane();
      store_scores(ds, where, own_ + L::kScores);
      GradientTiles(where, own_ + L::kRotated, own_ + L::kColumns, current()).store(ds);
    }
    fence_async();
    sums_.sync_consumer();
    {
      float dq[32], drows[32];
      product_fence();
      add_transposed(dk_, ds, queries());
      add_rotated(drows);
      multiply<false, true, true>(dq, own_ + L::kScores, own_ + L::kKeys);
      multiply<true, false, true>(dq, own_ + L::kColumns, column_block(high_.entry()));
      multiply<true, false, true>(dq, own_ + L::kColumns + L::kPairBytes, column_block(low.entry()));
      multiply<true, true, true>(dcolumns, own_ + L::kColumns, queries());
      product_commit();
      product_wait<0>();
      sums_.sync_consumer();  // every warp's products have read what the sums overwrite
      sums_.add_to_rows(drows, own_ + L::kScores, complete(), first_query());
      sums_.add_to_queries(dq, first_query(), turn());
    }
    sums_.wait_read();
    sums_.sync_consumers();
    sums_.add_to_columns(dcolumns, first_query());
    product_fence();
    multiply<false, true, true>(dcolumns, own_ + L::kColumns + L::kPairBytes, queries());
    product_commit();
    product_wait<0>();
    release_stage();
    release_slot();
  }

  // What the low block of the last tile of a run has: no tile follows.
  DK_DEVICE void finish_near(const float (&dcolumns)[32], int first_query) {
    const uint32_t nothing[16] = {};
    sums_.await_all();
    GradientTiles(lane(), own_ + L::kRotated, own_ + L::kColumns, current()).store(nothing);
    fence_async();
    sums_.sync_consumer();
    float drows[32];
    product_fence();
    add_rotated(drows);
    product_commit();
    product_wait<0>();
    sums_.sync_consumer();
    sums_.add_to_rows(drows, own_ + L::kScores, complete(), first_query);
    sums_.add_to_columns(dcolumns, first_query);
  }

  // ---- Scores

  // Load what both tables add to the scores of a near tile.
  DK_DEVICE void load_bias(float (&score)[32], int low) {
    sums_.await_all();
    const TileBias<Element> bias(lane(), own_ + L::kFrame, own_ + L::kScores, begun());
    {
      float high_rows[32], low_rows[32];
      product_fence();
      multiply<false, false, false>(high_rows, own_ + L::kKeys, row_block(high_.entry()));
      multiply<false, false, false>(low_rows, own_ + L::kKeys, row_block(low));
      product_commit();
      product_wait<0>();
      bias.store_rows(high_rows, low_rows);
    }
    {
      float high_columns[32], low_columns[32];
      product_fence();
      multiply<false, false, false>(high_columns, queries(), column_block(high_.entry()));
      multiply<false, false, false>(low_columns, queries(), column_block(low));
      product_commit();
      product_wait<0>();
      bias.store_p2c(high_columns, low_columns);
    }
    sums_.sync_consumer();
    bias.load(score);
  }

  // What a pair mask and dropout say of this thread's pairs: bit i of accumulator i. Found before there are scores, while
  // registers are free, and put together there: the compiler would keep the parts.
  struct Draws {
    uint32_t allowed = ~0u, kept = ~0u;
  };
  DK_DEVICE Draws draw() const {
    Draws draws;
    if (!kPair && !kDropout) return draws;
    const Place place = load_place<D>(shared_);
    const int first_key = keys_.first_key(visit().number());
    if (kPair) {
      const int keys[2] = {keys_.key(first_key, 0), keys_.key(first_key, 1)};
      draws.allowed = computed_anew(PairMask(p_, place).allowed_transposed(keys, first_query(), lane()));
    }
    if (kDropout) {
      draws.kept = computed_anew(kept_pairs(
          load_global(p_.seed) + opaque_zero(), (uint32_t)(place.batch * (int)p_.heads + place.head), first_key, first_query(),
          (uint32_t)p_.dropout_threshold, lane()));
    }
    return draws;
  }

  // Turn scores into probabilities, and those that dropout keeps into an operand.
  DK_DEVICE void probabilities(float (&score)[32], const Draws& draws, uint32_t (&weights)[16]) const {
    const float qk_scale = (float)p_.qk_scale;
    keys_.mask(score);
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      float shift[2], kept[4];
      load_shared_2(statistics() + 8 * n * 4, shift[0], shift[1]);
      DK_UNROLL
      for (int i = 0; i < 4; i++) {
        float& x = score[4 * n + i];
        if (kPair && !(draws.allowed >> (4 * n + i) & 1)) x = minus_infinity();
        x = exp2_fast(multiply_add(x, qk_scale, shift[i & 1]));
        kept[i] = !kDropout || draws.kept >> (4 * n + i) & 1 ? x : 0.0f;
      }
      DK_UNROLL
      for (int h = 0; h < 2; h++) weights[2 * n + h] = Element::pack(kept[2 * h], kept[2 * h + 1]);
    }
  }

  // A gradient of a probability after dropout, of one before.
  DK_DEVICE float before_dropout(float dp, const Draws& draws, int i) const {
    return !kDropout ? dp : draws.kept >> i & 1 ? dp * (float)p_.keep_scale : 0.0f;
  }

  // Turn probabilities p and gradients dp of dropped ones into gradients of scores, p (dp - out_dot_dout), as an operand.
  DK_DEVICE void score_gradients(
      const float (&p)[32], const float (&dp)[32], const Draws& draws, uint32_t (&ds)[16]) const {
    uint32_t sums = statistics() + kTile * 4;
    // A pair mask leaves no registers for it; without dropout few keys are a matter of a tenth of the error budget.
    if ((kDropout || !kPair) && visit().has_all_keys()) sums = sum_anew(p, dp, draws);
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      float out_dot_dout[2], x[4];
      load_shared_2(sums + 8 * n * 4, out_dot_dout[0], out_dot_dout[1]);
      DK_UNROLL
      for (int i = 0; i < 4; i++) {
        x[i] = p[4 * n + i] * (before_dropout(dp[4 * n + i], draws, 4 * n + i) - out_dot_dout[i & 1]);
      }
      DK_UNROLL
      for (int h = 0; h < 2; h++) ds[2 * n + h] = Element::pack(x[2 * h], x[2 * h + 1]);
    }
  }

  // The sums of out * dout, where this block has all keys: `out` is rounded to 16 bits, and where few keys share the
  // weight of a query its gradients are small differences, of numbers that must be computed alike. Returns where this
  // thread's lie, in the frame.
  DK_DEVICE uint32_t sum_anew(const float (&p)[32], const float (&dp)[32], const Draws& draws) const {
    constexpr int kPart = kTile * 8;  // of a warp: both sums of each query
    const int thread = (int)computed_anew((uint32_t)thread_);
    const uint32_t frame = computed_anew(own_) + L::kFrame;
    sums_.await_all();
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      DK_UNROLL
      for (int i = 0; i < 2; i++) {
        const int upper = 4 * n + i, lower = upper + 2;
        float total = p[upper] + p[lower];
        float sum = p[upper] * before_dropout(dp[upper], draws, upper);
        sum = multiply_add(p[lower], before_dropout(dp[lower], draws, lower), sum);
        DK_UNROLL
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          total += shuffle_xor(total, lanes);
          sum += shuffle_xor(sum, lanes);
        }
        if ((thread & 31) < 4) {
          const uint32_t target = computed_anew(frame) + thread / 32 * kPart + (8 * n + 2 * (thread & 3) + i) * 8;
          store_shared(target, total);
          store_shared(target + 4, sum);
        }
      }
    }
    sums_.sync_consumers();
    const uint32_t found = frame + 4 * kPart;
    if (thread < kTile) {
      float total = 0.0f, sum = 0.0f;
#pragma unroll 1
      for (int part = 0; part < 4 * L::kConsumers; part++) {
        float x, y;
        load_shared_2(
            shared_ + L::kConsumer + part / 4 * L::kConsumerBytes + L::kFrame + part % 4 * kPart + thread * 8, x, y);
        total += x;
        sum += y;
      }
      store_shared(found + thread * 4, sum / (total > 0.0f ? total : 1.0f) - gradient_of_lse(first_query() + thread));
    }
    sums_.sync_consumers();  // the other consumer has read these parts
    return found + 8 * (thread & 3);
  }

  DK_DEVICE float gradient_of_lse(int row) const {
    const Place place = load_place<D>(shared_);
    if (row >= place.nq) return 0.0f;
    const int64_t batch = p_.cu_seqlens ? 0 : place.batch, samples = p_.cu_seqlens ? 1 : p_.batch;
    return load_global(
        p_.out_dot_dout + (samples * p_.heads + batch * p_.heads + place.head) * p_.nq + place.first_token + row);
  }

  // Zero queries without a softmax, so that a NaN there meets no zero probability.
  DK_DEVICE void zero_padding() const {
    StageInfo info{};
    uint32_t first, zone;
    load_shared_4(stage_info(), info.valid_low, info.valid_high, first, zone);
    if (!is_partial(info)) return;
    zero_masked_rows<D, L::kConsumerThreads>(queries(), info, consumer_ * kWarpgroup + thread_);
    zero_masked_rows<D, L::kConsumerThreads>(douts(), info, consumer_ * kWarpgroup + thread_);
    fence_async();
    sums_.sync_consumers();
  }

  // ---- Products

  // Multiply rows in registers with a tile of tokens.
  template <bool kAccumulate>
  DK_DEVICE static void multiply_rows(float (&d)[32], const uint32_t (&rows)[4 * kSteps], uint32_t tile) {
    const uint32_t start = operand_start(tile);
    Element::template product<kAccumulate, false>(d, rows, columns_inside<kTile>(start, 0));
    DK_UNROLL
    for (int k = 1; k < kSteps; k++) {
      Element::template product<true, false>(d, rows + 4 * k, columns_inside<kTile>(start, k));
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

  DK_DEVICE void add_row_sums(float (&row_sums)[4], const uint32_t (&ds)[16]) const {
    const uint64_t ones = descriptor(operand_start(shared_ + L::kOnes));
    DK_UNROLL
    for (int k = 0; k < kOver; k++) Element::product_of_8(row_sums, ds + 4 * k, ones);
  }

  // Multiply two tiles of 64 x 64. kFirstRows, kSecondRows: the product sums over the rows of the tile, not its columns.
  // Pair masks and dropout leave no registers to keep descriptors in over the loops, so these are made where they are used.
  template <bool kAccumulate, bool kFirstRows, bool kSecondRows>
  DK_DEVICE static void multiply(float (&d)[32], uint32_t first, uint32_t second) {
    constexpr bool kAnew = kPair || kDropout;
    const uint32_t a = operand_start(kAnew ? computed_anew(first) : first);
    const uint32_t b = operand_start(kAnew ? computed_anew(second) : second);
    DK_UNROLL
    for (int k = 0; k < kOver; k++) {
      const uint64_t x = kFirstRows ? rows_inside<kTile>(a, 0, k) : columns_inside<kTile>(a, k);
      const uint64_t y = kSecondRows ? rows_inside<kTile>(b, 0, k) : columns_inside<kTile>(b, k);
      if (kAccumulate || k > 0) Element::template product<true, kFirstRows, kSecondRows>(d, x, y);
      else Element::template product<false, kFirstRows, kSecondRows>(d, x, y);
    }
  }

  // What the complete block of the rows' table adds to the gradient of the keys, and the gradient of the block.
  DK_DEVICE void add_rotated(float (&drows)[32]) {
    multiply<true, false, true>(dk_, complete(), row_block(high_.entry()));
    multiply<false, true, true>(drows, complete(), own_ + L::kKeys);
  }

  const BackwardParams& p_;
  const uint32_t shared_, own_;
  const int consumer_, thread_;
  KeyRows<Element, D> keys_;
  Sums<D> sums_;
  RingCounter<L::kStages> stage_;
  RingCounter<L::kSlots> high_;  // the slot of this consumer's high block
  uint32_t v_[4 * kSteps];
  float dk_[32], dv_[32];
};

}  // namespace dk
