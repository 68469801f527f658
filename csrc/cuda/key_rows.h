// The 64 keys of a consumer: loaded, as operands of products, and what their rows receive.
#pragma once
#include "mask.h"
#include "reduction.h"

namespace dk {

template <class Element, int D>
class KeyRows {
  using L = BackwardLayout<D>;
  static constexpr int kFragment = D / kStep * 4;  // registers of 64 rows as a first operand

 public:
  DK_DEVICE KeyRows(const BackwardParams& p, uint32_t shared, int consumer, int thread)
      : p_(p), shared_(shared), consumer_(consumer), thread_(thread) {}

  DK_DEVICE void begin(int number) {
    const Place place = load_place<D>(shared_);
    const KeyBlock block(place, number, L::kRows);
    const int first_key = block.first_key + consumer_ * kTile;
    flags_ = 0;
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      const bool there = key(first_key, h) >= block.start && key(first_key, h) < block.stop;
      bool valid = there;
      if (valid && p_.key_mask) {
        valid = load_global(p_.key_mask + place.batch * p_.key_mask_stride_b + key(first_key, h)) != 0;
      }
      flags_ |= there * (kThere << h) | valid * (kValid << h);
    }
    if (ballot((flags_ & 3 * kValid) == 3 * kValid) != 0xffffffffu) flags_ |= kPartial;
  }

  DK_DEVICE int first_key(int number) const {
    return KeyBlock(load_place<D>(shared_), number, L::kRows).first_key + consumer_ * kTile;
  }
  // The key of row g, or g + 8, of this lane's warp.
  DK_DEVICE int key(int first_key, int h) const { return first_key + 16 * w() + 8 * h + query_of_row(g()); }

  // Forbid keys that nobody may attend to.
  DK_DEVICE void mask(float (&score)[32]) const {
    if (!(flags_ & kPartial)) return;
    DK_UNROLL
    for (int i = 0; i < 32; i++) {
      if (!is_valid((i >> 1) & 1)) score[i] = minus_infinity();
    }
  }

  // Load rows as the first operand of products; those of keys that nobody may attend to are 0.
  DK_DEVICE void load_k(uint32_t (&rows)[kFragment], int number) const {
    load(rows, number, p_.k, p_.k_stride_b, p_.k_stride_h, p_.k_stride_n);
  }
  DK_DEVICE void load_v(uint32_t (&rows)[kFragment], int number) const {
    load(rows, number, p_.v, p_.v_stride_b, p_.v_stride_h, p_.v_stride_n);
  }

  // Store the keys as an operand of the products that sum over keys, plus, in a far zone, the row a of its distances:
  // the sum of ds_ij (k_j + a) is what the zone adds to the gradients of queries. A fence must follow.
  DK_DEVICE void store_k(const uint32_t (&k)[kFragment], int zone) const {
    const bool far = zone == kLeft || zone == kRight;
    const uint32_t target = own() + L::kKeys + (16 * w() + g()) * kRowBytes + g() * 16 + t() * 4;
    const uint16_t* a = far ? end_row(p_.pos_key_rows, zone) : nullptr;
    DK_UNROLL
    for (int n = 0; n < kFragment / 2; n++) {
      float a0 = 0.0f, a1 = 0.0f;
      if (far) Element::unpack(load_global(reinterpret_cast<const uint32_t*>(a + 8 * n)), a0, a1);
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float k0, k1;
        Element::unpack(k[2 * n + h], k0, k1);
        store_shared((target ^ n * 16) + h * 8 * kRowBytes, Element::pack(k0 + a0, k1 + a1));
      }
    }
  }

  // ---- Sums of a far zone

  // Keep what the gradients of the keys are before a far zone, in memory that only near tiles use; each thread its own.
  DK_DEVICE void keep(const float (&dk)[32]) const {
    float sums[16] = {};
    add_rows(dk, sums, -1.0f);
    DK_UNROLL
    for (int i = 0; i < 4; i++) {
      const float* x = sums + 4 * i;
      store_shared_floats(own() + L::kRotated + i * kChunkBytes + thread_ * 16, x[0], x[1], x[2], x[3]);
    }
  }

  // Store what the zone adds to the gradients of the end rows of both tables. With s_j the sums of ds over its queries,
  // that of pos_query is the sum of s_j k_j; that of pos_key the sum of ds_ij q_i, which is what the zone adds to the
  // gradients of all keys, the sum of ds_ij (q_i + b), less that of s_j b. Nothing else uses the frame now.
  DK_DEVICE void store_far_sums(
      const float (&dk)[32], const float (&row_sums)[4], const uint32_t (&k)[kFragment], Visit visit) const {
    float of_keys[16], of_rows[16] = {};
    DK_UNROLL
    for (int i = 0; i < 4; i++) {
      float* x = of_keys + 4 * i;
      load_shared_floats(own() + L::kRotated + i * kChunkBytes + thread_ * 16, x[0], x[1], x[2], x[3]);
    }
    add_rows(dk, of_keys, 1.0f);
    const uint16_t* b = end_row(p_.pos_query_rows, visit.zone());
    const float s[2] = {row_sums[0], row_sums[2]};
    DK_UNROLL
    for (int n = 0; n < 8; n++) {
      float b0, b1;
      Element::unpack(load_global(reinterpret_cast<const uint32_t*>(b + 8 * n)), b0, b1);
      of_keys[2 * n] -= (s[0] + s[1]) * b0, of_keys[2 * n + 1] -= (s[0] + s[1]) * b1;
      DK_UNROLL
      for (int h = 0; h < 2; h++) {
        float k0, k1;
        Element::unpack(computed_anew(k[2 * n + h]), k0, k1);  // else unpacked from `store_k` on, in twice the registers
        of_rows[2 * n] += s[h] * k0, of_rows[2 * n + 1] += s[h] * k1;
      }
    }
    store_columns(of_keys, 0, visit);
    store_columns(of_rows, 1, visit);
  }

  // ---- Results

  DK_DEVICE void store_gradients(const float (&dk)[32], const float (&dv)[32], int number) const {
    const int first_key = this->first_key(number);
    const Place place = load_place<D>(shared_);
    const int batch = p_.cu_seqlens ? 0 : place.batch;
    const float scale = (float)p_.scale, keep_scale = (float)p_.keep_scale;
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      if (!(flags_ & kThere << h)) continue;
      const int64_t token = batch * p_.nk + place.first_token + key(first_key, h);
      const int64_t at = (token * p_.heads + place.head) * D + 2 * t();
      uint16_t *to_k = static_cast<uint16_t*>(p_.dk) + at, *to_v = static_cast<uint16_t*>(p_.dv) + at;
      const float* dmean = p_.dmean + ((int64_t)batch * p_.heads + place.head) * D + 2 * t();
      DK_UNROLL
      for (int n = 0; n < 8; n++) {
        const int i = 4 * n + 2 * h;
        float x = dv[i] * keep_scale, y = dv[i + 1] * keep_scale;
        if (p_.dmean) x += load_global(dmean + 8 * n), y += load_global(dmean + 8 * n + 1);
        store_global(reinterpret_cast<uint32_t*>(to_v + 8 * n), Element::pack(x, y));
        store_global(reinterpret_cast<uint32_t*>(to_k + 8 * n), Element::pack(dk[i] * scale, dk[i + 1] * scale));
      }
    }
  }

 private:
  // Of this thread's two keys, which are there, and which may be attended to; whether some key of its warp may not.
  static constexpr int kThere = 1, kValid = 4, kPartial = 16;
  DK_DEVICE uint32_t own() const { return shared_ + L::kConsumer + consumer_ * L::kConsumerBytes; }
  DK_DEVICE int w() const { return thread_ / 32; }
  DK_DEVICE int g() const { return (thread_ & 31) >> 2; }
  DK_DEVICE int t() const { return thread_ & 3; }
  DK_DEVICE bool is_valid(int h) const { return flags_ & kValid << h; }

  DK_DEVICE void load(
      uint32_t (&rows)[kFragment], int number, const void* from, int64_t stride_b, int64_t stride_h,
      int64_t stride_n) const {
    const Place place = load_place<D>(shared_);
    const int batch = p_.cu_seqlens ? 0 : place.batch;
    const int first_key = this->first_key(number);
    const uint16_t* base = static_cast<const uint16_t*>(from) + batch * stride_b + place.head * stride_h + 2 * t();
    DK_UNROLL
    for (int h = 0; h < 2; h++) {
      const uint16_t* row = base + (int64_t)(place.first_token + key(first_key, h)) * stride_n;
      DK_UNROLL
      for (int half = 0; half < kFragment / 2; half++) {
        rows[2 * half + h] = is_valid(h) ? load_global(reinterpret_cast<const uint32_t*>(row + 8 * half)) : 0;
      }
    }
  }

  // The row of a table that all pairs of a far zone read, from this lane's columns on.
  DK_DEVICE const uint16_t* end_row(const void* rows, int zone) const {
    const int64_t row = load_place<D>(shared_).head * p_.table_rows + (zone == kLeft ? p_.table_rows - 1 : 0);
    return static_cast<const uint16_t*>(rows) + row * D + 2 * t();
  }

  // This thread's share of the sums over rows of an accumulator, for columns 8 n + 2 t + e.
  DK_DEVICE static void add_rows(const float (&d)[32], float (&sums)[16], float factor) {
    DK_UNROLL
    for (int i = 0; i < 16; i++) sums[i] += factor * (d[4 * (i >> 1) + (i & 1)] + d[4 * (i >> 1) + 2 + (i & 1)]);
  }

  // Sum the shares of all threads and store them.
  DK_DEVICE void store_columns(const float (&sums)[16], int table, Visit visit) const {
    const uint32_t scratch = own() + L::kFrame + table * 4 * D * 4;
    DK_UNROLL
    for (int i = 0; i < 16; i++) {
      float x = sums[i] + shuffle_xor(sums[i], 4);
      x += shuffle_xor(x, 8);
      x += shuffle_xor(x, 16);
      if (g() == 0) store_shared(scratch + (w() * D + 8 * (i >> 1) + 2 * t() + (i & 1)) * 4, x);
    }
    sync_threads(kConsumerBarrier + consumer_, kWarpgroup);
    if (thread_ >= D / 2) return;
    float sum[2] = {0.0f, 0.0f};
    DK_UNROLL
    for (int w = 0; w < 4; w++) {
      float x, y;
      load_shared_2(scratch + (w * D + 2 * thread_) * 4, x, y);
      sum[0] += x, sum[1] += y;
    }
    const Place place = load_place<D>(shared_);
    const int64_t blocks = p_.batch * p_.key_blocks * L::kConsumers;
    const int64_t block = (place.batch * p_.key_blocks + visit.number()) * L::kConsumers + consumer_;
    const int64_t part = (2 * table + (visit.zone() == kRight)) * p_.heads + place.head;
    float* target = p_.far_sums + (part * blocks + block) * D + 2 * thread_;
    store_global(target, sum[0]);
    store_global(target + 1, sum[1]);
  }

  const BackwardParams& p_;
  const uint32_t shared_;
  const int consumer_, thread_;
  int flags_ = 0;
};

}  // namespace dk
