// Adding a warpgroup's accumulators to sums in global memory: staged in shared memory, added by the copy engine.
//
// A sum of 64 x 64 lies in global memory as the accumulators do, so that neither staging nor copies need an order of
// their own: thread i's registers 4 j ... 4 j + 3 are floats 512 j + 4 i ... of it.
//
// Each thread 0 waits for its sums before it asks for the next ones to the same place. So the order of what one block
// adds is fixed, which is what makes a backward deterministic whose blocks share no sums.
#pragma once
#include "backward_schedule.h"

namespace dk {

constexpr int kChunkBytes = kWarpgroup * 4 * 4;  // 4 registers of each thread
constexpr int kHalfBytes = 4 * kChunkBytes;      // 16 registers of each thread: half of a tile's
constexpr int kHalfFloats = kHalfBytes / 4;

// Store registers of chunks kFirst ... kFirst + 3.
template <int kFirst>
DK_DEVICE void stage_half(const float (&sum)[32], uint32_t address, int thread) {
  DK_UNROLL
  for (int j = 0; j < 4; j++) {
    const float* x = sum + 4 * (kFirst + j);
    store_shared_floats(address + j * kChunkBytes + thread * 16, x[0], x[1], x[2], x[3]);
  }
}

// Add what another consumer staged.
template <int kFirst>
DK_DEVICE void add_half(float (&sum)[32], uint32_t address, int thread) {
  DK_UNROLL
  for (int j = 0; j < 4; j++) {
    float x[4];
    load_shared_floats(address + j * kChunkBytes + thread * 16, x[0], x[1], x[2], x[3]);
    DK_UNROLL
    for (int i = 0; i < 4; i++) sum[4 * (kFirst + j) + i] += x[i];
  }
}

// One consumer's sums.
template <int D>
class Sums {
  using L = BackwardLayout<D>;

 public:
  DK_DEVICE Sums(const BackwardParams& p, uint32_t shared, int consumer, int thread)
      : p_(p), shared_(shared), consumer_(consumer), thread_(thread) {}

  DK_DEVICE void begin(int number) const {
    if (thread_ != 0) return;
    const Place place = load_place<D>(shared_);
    const int x0 = KeyBlock(place, number, L::kRows).first_key + consumer_ * kTile - place.prefix;
    store_shared(first_block(), (uint32_t)(((int)p_.table_offset + x0) / kTile));
  }

  DK_DEVICE uint32_t own() const { return shared_ + L::kConsumer + consumer_ * L::kConsumerBytes; }
  DK_DEVICE void sync_consumer() const { sync_threads(kConsumerBarrier + consumer_, kWarpgroup); }
  DK_DEVICE void sync_consumers() const { sync_threads(kConsumersBarrier, L::kConsumerThreads); }

  // Until the copy engine has added this consumer's sums and the other consumer has read its half, the frame and the
  // gradients of the tile before must stay.
  DK_DEVICE void await_all() const {
    wait();
    sync_consumers();
  }
  DK_DEVICE void wait() const {
    if (thread_ == 0) reduce_wait();
  }
  DK_DEVICE void wait_read() const {
    if (thread_ == 0) reduce_wait_read();
  }

  // Add a tile of queries' gradients. Both consumers exchange halves of their sums over keys, so that each adds half of
  // the block's to global memory. The two halves of the frame take turns: what this consumer adds now lies where its
  // neighbour read before. `turn`: 0 and 1 alternately.
  DK_DEVICE void add_to_queries(float (&dq)[32], int first_query, int turn) const {
    const uint32_t frame = own() + L::kFrame, neighbour = frame + (consumer_ ? -1 : 1) * L::kConsumerBytes;
    const uint32_t given = turn * kHalfBytes, summed = kHalfBytes - given;
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
      const Place place = load_place<D>(shared_);
      const int64_t sum = query_sum(p_, place, first_query);
      reduce_add(p_.dq_sums + (2 * sum + consumer_) * kHalfFloats, frame + summed, kHalfBytes);
      reduce_commit();
    }
  }

  // Add the gradient of a block of pos_query, by way of two halves of shared memory. `first_query` of the tile whose high
  // block it is. In one group with what is added next.
  DK_DEVICE void add_to_rows(const float (&drows)[32], uint32_t lower, uint32_t upper, int first_query) const {
    stage_half<0>(drows, lower, thread_);
    stage_half<4>(drows, upper, thread_);
    fence_async();
    sync_consumer();
    if (thread_ == 0) {
      float* sum = table_sum(1, first_query);
      reduce_add(sum, lower, kHalfBytes);
      reduce_add(sum + kHalfFloats, upper, kHalfBytes);
    }
  }

  // Add the gradient of a block of pos_key, by way of the frame.
  DK_DEVICE void add_to_columns(const float (&dcolumns)[32], int first_query) const {
    const uint32_t frame = own() + L::kFrame;
    stage_half<0>(dcolumns, frame, thread_);
    stage_half<4>(dcolumns, frame + kHalfBytes, thread_);
    fence_async();
    sync_consumer();
    if (thread_ == 0) {
      reduce_add(table_sum(0, first_query), frame, 2 * kHalfBytes);
      reduce_commit();
    }
  }

 private:
  DK_DEVICE uint32_t first_block() const { return shared_ + L::kFirstBlock + consumer_ * 4; }

  DK_DEVICE float* table_sum(int table, int first_query) const {
    const Place place = load_place<D>(shared_);
    const uint32_t block = load_shared(first_block());
    float* copy = p_.dtables + place.batch * p_.dtables_stride_b + consumer_ * p_.dtables_stride_consumer;
    const int64_t first = (table * p_.heads + place.head) * (p_.table_rows / kTile);
    return copy + (first + ((int)block - first_query / kTile)) * 2 * kHalfFloats;
  }

  const BackwardParams& p_;
  const uint32_t shared_;
  const int consumer_, thread_;
};

}  // namespace dk
