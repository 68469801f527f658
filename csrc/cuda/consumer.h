// A consumer: one warpgroup that attends with 64 queries, tile by tile as the producer brings them.
//
// The products of a tile's exponentials with its values run beside the first products of the tile after it, and so does
// the softmax of a far tile. All products of one pass of a loop are issued and waited for in that pass: the compiler
// would run them one by one otherwise.
#pragma once
#include "dropout.h"
#include "softmax.h"

namespace dk {

template <class Element, int D, bool kPair, bool kDropout>
class Consumer {
  using L = Layout<D>;
  static constexpr int kSteps = D / kStep;            // products over the head dimension
  static constexpr int kPanels = D / kPanelColumns;
  static constexpr bool kFewRegisters = L::kFewRegisters;

 public:
  DK_DEVICE Consumer(const ForwardParams& p, const Place& place, uint32_t shared, int consumer, int thread, int warp)
      : p_(p), place_(place), shared_(shared), consumer_(consumer), thread_(thread), lane_(thread, warp),
        frames_(lane_, shared + L::kRings + consumer * 2 * L::kFrameBytes,
                shared + L::kFrames + consumer * L::kFrameBytes),
        qk_scale_((float)p.qk_scale) {
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      rows_[h] = place.first_row + consumer * kTile + 16 * warp + 8 * h + query_of_row(lane_.g);
    }
    DK_UNROLL
    for (int i = 0; i < kPanels * 32; i++) values_[i / 32][i % 32] = 0.0f;
  }

  DK_DEVICE void run() {
    StageInfo info = next_stage();
    while (info.zone != kEnd) {
      if (info.zone == kNearFirst) near_run(info);
      else far_zone(info);
    }
    finish();
  }

 private:
  // ---- Pipeline

  // Wait for the next tile.
  DK_DEVICE StageInfo next_stage() {
    barrier_wait(shared_ + L::kStageFull + stage_.entry * 8, stage_.parity);
    StageInfo info;
    uint32_t first_key, zone;
    load_shared_4(shared_ + L::kStageInfo + stage_.entry * 16, info.valid_low, info.valid_high, first_key, zone);
    info.first_key = (int)first_key, info.zone = (int)zone;
    return info;
  }
  DK_DEVICE uint32_t keys() const { return shared_ + L::kKeys + stage_.entry * L::kTileBytes; }
  DK_DEVICE uint32_t values() const { return shared_ + L::kValues + stage_.entry * L::kTileBytes; }
  // The products with the tile before are done.
  DK_DEVICE void release_stage_before() {
    sync_warp();  // every lane has read what the stage says of its keys
    if ((thread_ & 31) == 0) barrier_arrive(shared_ + L::kStageEmpty + before_ * 8);
  }
  DK_DEVICE void wait_slot(const RingPosition<L::kSlots>& slot) const {
    barrier_wait(shared_ + L::kSlotFull + slot.entry * 8, slot.parity);
  }
  DK_DEVICE void release_slot() { release(high_); }
  DK_DEVICE void release(RingPosition<L::kSlots>& slot) const {
    if ((thread_ & 31) == 0) barrier_arrive(shared_ + L::kSlotEmpty + slot.entry * 8);
    slot.advance();
  }

  // ---- Zones

  // Attend to the tiles of a far zone: plain attention with another query, q + b, and a constant per row, q . a.
  DK_DEVICE void far_zone(StageInfo& info) {
    const int zone = info.zone;
    uint32_t q[4 * kSteps];
    float constant[2];
    load_far_queries(zone, q, constant);
    DK_UNROLL
    for (int h = 0; h < 2; h++) statistics_.maximum[h] -= constant[h];  // left out of scores and maximum alike
    far_tile<true>(info, q);
    info = next_stage();
    while (info.zone == zone) {
      far_tile<false>(info, q);
      info = next_stage();
    }
    finish_values();
    DK_UNROLL
    for (int h = 0; h < 2; h++) statistics_.maximum[h] += constant[h];
  }

  // `kFirst`: of the zone; no values of a tile before are left to add.
  template <bool kFirst>
  DK_DEVICE void far_tile(const StageInfo& info, const uint32_t (&q)[4 * kSteps]) {
    float score[32];
    product_fence();
    multiply_queries<false>(score, q, keys());
    product_commit();
    if (!kFirst) add_values();
    product_wait<kFirst ? 0 : 1>();
    attend<!kFirst>(score, info);
  }

  // Attend to neighbouring near tiles, the first one of which is the current one.
  DK_DEVICE void near_run(StageInfo& info) {
    uint32_t q[4 * kSteps];
    load_queries(q);
    // Of the high blocks of a run, in the order of the copies, the last one belongs to consumer 0.
    RingPosition<L::kSlots> skipped = high_;
    DK_UNROLL
    for (int i = 0; i < L::kConsumers - 1; i++) {
      if (i < L::kConsumers - 1 - consumer_) high_.advance();
    }
    wait_slot(high_);
    // Not before that: until the copies of a run begin, the other consumer may still read what lay in these slots. It has
    // not released that yet, and these arrivals would count for it.
    DK_UNROLL
    for (int i = 0; i < L::kConsumers - 1; i++) {
      if (i < L::kConsumers - 1 - consumer_) release(skipped);
    }
    {
      // What the first tile needs of its high block a product brings that otherwise the tile before would have made.
      float product[32];
      product_fence();
      multiply_queries<false>(product, q, shared_ + L::kPosKey + high_.entry * L::kTileBytes);
      product_commit();
      product_wait<0>();
      frames_.advance();
      frames_.store_c2p(product);
      frames_.advance();
    }
    near_tile<true>(info, q);
    info = next_stage();
    while (info.zone == kNear) {
      near_tile<false>(info, q);
      info = next_stage();
    }
    finish_values();
    // The last low blocks: this consumer's own, and those of the consumers before it, whose copies have begun, since the
    // stage that follows is there.
    DK_UNROLL
    for (int i = 0; i < L::kConsumers; i++) {
      if (i <= consumer_) release_slot();
    }
  }

  template <bool kFirst>
  DK_DEVICE void near_tile(const StageInfo& info, const uint32_t (&q)[4 * kSteps]) {
    RingPosition<L::kSlots> low = high_;
    low.advance();
    wait_slot(low);
    float score[32];
    {
      float p2c_high[32], p2c_low[32];
      {
        float c2p[32];
        product_fence();
        multiply_queries<false>(c2p, q, shared_ + L::kPosKey + low.entry * L::kTileBytes);
        product_commit();
        if (!kFewRegisters) multiply_keys_with_both(p2c_high, p2c_low, low);
        if (!kFirst) add_values();
        product_wait<kFewRegisters ? 0 : kFirst ? 1 : 2>();
        frames_.store_c2p(c2p);
      }
      if (kFewRegisters) {
        product_fence();
        multiply_keys_with_both(p2c_high, p2c_low, low);
      }
      product_wait<kFewRegisters || kFirst ? 0 : 1>();
      release_slot();
      sync_consumer();  // every warp has read the frame of the tile before
      frames_.store_p2c(p2c_high, p2c_low);
      sync_consumer();
    }
    frames_.load(score);
    frames_.advance();
    product_fence();
    multiply_queries<true>(score, q, keys());
    product_commit();
    product_wait<0>();
    attend<!kFirst>(score, info);
  }

  DK_DEVICE void sync_consumer() const { sync_threads(kConsumerBarrier + consumer_, kWarpgroup); }

  // ---- Products

  template <bool kAccumulate>
  DK_DEVICE static void multiply_queries(float (&d)[32], const uint32_t (&q)[4 * kSteps], uint32_t tile) {
    const uint32_t start = operand_start(tile);
    Element::template product<kAccumulate, false>(d, q, columns_inside<kTile>(start, 0));
    DK_UNROLL
    for (int k = 1; k < kSteps; k++) {
      Element::template product<true, false>(d, q + 4 * k, columns_inside<kTile>(start, k));
    }
  }

  // Multiply the keys of the current tile, as rows, with a table block.
  DK_DEVICE void multiply_keys(float (&d)[32], uint32_t block) const {
    const uint32_t rows = operand_start(keys()), columns = operand_start(block);
    Element::template product<false>(d, columns_inside<kTile>(rows, 0), columns_inside<kTile>(columns, 0));
    DK_UNROLL
    for (int k = 1; k < kSteps; k++) {
      Element::template product<true>(d, columns_inside<kTile>(rows, k), columns_inside<kTile>(columns, k));
    }
  }

  DK_DEVICE void multiply_keys_with_both(
      float (&high)[32], float (&low)[32], const RingPosition<L::kSlots>& low_slot) const {
    multiply_keys(high, shared_ + L::kPosQuery + high_.entry * L::kTileBytes);
    multiply_keys(low, shared_ + L::kPosQuery + low_slot.entry * L::kTileBytes);
    product_commit();
  }

  // Multiply the exponentials of the tile before with its values.
  DK_DEVICE void add_values() {
    const uint32_t start = operand_start(shared_ + L::kValues + before_ * L::kTileBytes);
    DK_UNROLL
    for (int k = 0; k < kTile / kStep; k++) {
      DK_UNROLL
      for (int panel = 0; panel < kPanels; panel++) {
        Element::template product<true, true>(values_[panel], weights_ + 4 * k, rows_inside<kTile>(start, panel, k));
      }
    }
    product_commit();
  }

  // Add the values of the last tile of a zone.
  DK_DEVICE void finish_values() {
    product_fence();
    add_values();
    product_wait<0>();
    release_stage_before();
  }

  // Turn the scores of the current tile into weights for its values, which `add_values` adds later. `kAdding`: those of
  // the tile before are being added.
  template <bool kAdding>
  DK_DEVICE void attend(float (&score)[32], const StageInfo& info) {
    if (is_partial(info)) {
      mask_keys(score, info, lane_);
      zero_masked_values<D>(values(), info, consumer_ * kWarpgroup + thread_);
    }
    if (kPair) PairMask(p_, place_).apply(score, rows_, info.first_key, lane_);
    float correction[2];
    exponentials(score, statistics_, qk_scale_, correction);
    if (kDropout) {
      drop(score, load_global(p_.seed), (uint32_t)(place_.batch * (int)p_.heads + place_.head), rows_, info.first_key,
           (uint32_t)p_.dropout_threshold, lane_);
    }
    if (kAdding) {
      product_wait<0>();
      release_stage_before();
    }
    DK_UNROLL
    for (int panel = 0; panel < kPanels; panel++) {
      DK_UNROLL
      for (int i = 0; i < 32; i++) values_[panel][i] *= correction[(i >> 1) & 1];
    }
    to_operand<Element>(score, weights_);
    before_ = stage_.entry;
    stage_.advance();
  }

  // ---- Queries

  // Load the first operand of the products with queries: rows g and g + 8, columns 2 t, 2 t + 1 and these + 8 of each
  // step. Rows beyond the end are zero.
  DK_DEVICE void load_queries(uint32_t (&q)[4 * kSteps]) const {
    const int batch = p_.cu_seqlens ? 0 : place_.batch;
    const uint16_t* base =
        static_cast<const uint16_t*>(p_.q) + batch * p_.q_stride_b + place_.head * p_.q_stride_h + 2 * lane_.t;
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      const bool inside = rows_[h] < place_.nq;
      const uint16_t* row = base + (int64_t)(place_.first_token + rows_[h]) * p_.q_stride_n;
      DK_UNROLL
      for (int half = 0; half < 2 * kSteps; half++) {
        const uint32_t pair = inside ? load_global(reinterpret_cast<const uint32_t*>(row + 8 * half)) : 0;
        q[4 * (half >> 1) + 2 * (half & 1) + h] = pair;
      }
    }
  }

  // Load q + b, rounded, and q . a in units of the maximum; a and b are the table rows of a zone's distances.
  DK_DEVICE void load_far_queries(int zone, uint32_t (&q)[4 * kSteps], float (&constant)[2]) const {
    load_queries(q);
    constant[0] = constant[1] = 0.0f;
    if (zone == kPrefix) return;
    const int64_t row = (int64_t)place_.head * p_.table_rows + (zone == kLeft ? p_.table_rows - 1 : 0);
    const uint16_t* a = static_cast<const uint16_t*>(p_.pos_key_rows) + row * D + 2 * lane_.t;
    const uint16_t* b = static_cast<const uint16_t*>(p_.pos_query_rows) + row * D + 2 * lane_.t;
    DK_UNROLL
    for (int half = 0; half < 2 * kSteps; half++) {
      float a0, a1, b0, b1;
      Element::unpack(load_global(reinterpret_cast<const uint32_t*>(a + 8 * half)), a0, a1);
      Element::unpack(load_global(reinterpret_cast<const uint32_t*>(b + 8 * half)), b0, b1);
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        uint32_t& pair = q[4 * (half >> 1) + 2 * (half & 1) + h];
        float q0, q1;
        Element::unpack(pair, q0, q1);
        constant[h] += q0 * a0 + q1 * a1;
        pair = Element::pack(q0 + b0, q1 + b1);
      }
    }
    DK_UNROLL
    for (int h = 0; h < 2; h++) constant[h] = sum_of_row(constant[h]) * qk_scale_;
  }

  // ---- Results

  DK_DEVICE void finish() const {
    const int batch = p_.cu_seqlens ? 0 : place_.batch;
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      const float total = sum_of_row(statistics_.total[h]);
      if (rows_[h] >= place_.nq) continue;
      const int64_t token = batch * p_.nq + place_.first_token + rows_[h];
      bool padded = false;
      if (p_.mean) {
        padded = total == 0.0f;
        if (p_.query_mask) {
          padded |= !load_global(p_.query_mask + place_.batch * p_.query_mask_stride_b + rows_[h]);
        }
      }
      uint16_t* out = static_cast<uint16_t*>(p_.out) + (token * p_.heads + place_.head) * D + 2 * lane_.t;
      const float* mean = p_.mean + ((int64_t)batch * p_.heads + place_.head) * D + 2 * lane_.t;
      const float factor = (float)p_.keep_scale / total;
      DK_UNROLL
      for (int n = 0; n < D / 8; n++) {
        const float* pair = values_[n >> 3] + 4 * (n & 7) + 2 * h;
        float x = pair[0] * factor, y = pair[1] * factor;
        if (padded) x = load_global(mean + 8 * n), y = load_global(mean + 8 * n + 1);
        store_global(reinterpret_cast<uint32_t*>(out + 8 * n), Element::pack(x, y));
      }
      if (lane_.t == 0) {
        // Doubles, so that a large maximum is rounded once.
        const double log2_sum = (double)statistics_.maximum[h] + (double)log2_exact(total);
        const float lse = padded ? minus_infinity() : (float)(log2_sum * 0.69314718055994530942);
        const int64_t rows = batch * p_.heads + place_.head;
        store_global(p_.lse + rows * p_.nq + place_.first_token + rows_[h], lse);
      }
    }
  }

  const ForwardParams& p_;
  const Place& place_;
  const uint32_t shared_;
  const int consumer_, thread_;
  const Lane lane_;
  BiasFrames<Staging<Element, Element::kRoundsBias ? 2 : 4>, kFewRegisters> frames_;
  const float qk_scale_;
  int rows_[2];
  RingPosition<L::kStages> stage_;  // of the current tile
  int before_ = 0;                  // the stage of the tile before
  RingPosition<L::kSlots> high_;    // the slot of this consumer's high block
  Statistics statistics_;
  float values_[kPanels][32];
  uint32_t weights_[16];            // exponentials of the tile before, as operands
};

}  // namespace dk
