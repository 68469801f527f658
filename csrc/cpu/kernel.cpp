// One instruction-set variant of the kernels. Compiled once per variant with that variant's -m flags and
// -DDK_VARIANT=<name>; everything it includes lives in anonymous namespaces, so variants cannot mix at link time.
#include <time.h>

#include <algorithm>

#include "backward.h"
#include "checksum.h"
#include "forward.h"
#include "hidden_dropout.h"
#include "linear.h"

#define DK_CONCAT_(a, b) a##b
#define DK_CONCAT(a, b) DK_CONCAT_(a, b)
#define DK_STRING_(a) #a
#define DK_STRING(a) DK_STRING_(a)

namespace {

using namespace dk;

// Call run(word) with the words that this variant multiplies for a data type.
template <class Run>
auto with_word(int64_t dtype, const Run& run) {
#ifdef DK_HAS_BF16_DOT
  if (dtype == kBFloat16) return run(BFloat16Word());
#endif
  (void)dtype;
  return run(FloatWord());
}

int64_t prepared_bytes(const AttentionParams& p) {
  return with_word(p.dtype, [&](auto word) {
    return PackedTables<decltype(word)>::floats_per_head(p) * p.heads * (int64_t)sizeof(float);
  });
}

int prepare(const AttentionParams& p, void* packed) {
  const bool done = with_word(p.dtype, [&](auto word) {
    return run_tasks(p.heads, p.threads, 64,
                     [&](int64_t h, char*) { PackedTables<decltype(word)>::pack(p, h, static_cast<float*>(packed)); });
  });
  return done ? kOk : kOutOfMemory;
}

int forward(const AttentionParams& p) {
  if (p.prepared && p.prepared_bytes != prepared_bytes(p)) return kBadPrepared;
  const SlotIndex index(p);
  static thread_local ThreadBlock own;
  const float* packed = static_cast<const float*>(p.prepared);
  if (!packed && (p.has_pos_key || p.has_pos_query)) {
    float* tables = reinterpret_cast<float*>(own.get(prepared_bytes(p)));
    if (!tables) return kOutOfMemory;
    if (prepare(p, tables) != kOk) return kOutOfMemory;
    packed = tables;
  }
  const bool done = with_word(p.dtype, [&](auto word) { return Forward<decltype(word)>(p, index, packed).run(); });
  own.trim();
  return done ? kOk : kOutOfMemory;
}

int backward(const AttentionParams& p) {
  const SlotIndex index(p);
  if (p.nq <= kFewRows) return Backward<FloatWord>(p, index).run() ? kOk : kOutOfMemory;
  const bool done = with_word(p.dtype, [&](auto word) { return Backward<decltype(word)>(p, index).run(); });
  return done ? kOk : kOutOfMemory;
}

int linear(const LinearParams& p) {
  return with_word(p.dtype, [&](auto word) -> int {
    using Layer = Linear<decltype(word)>;
    if (!Layer::supports(p)) return kUnsupported;
    if (p.tokens == 0 || p.out_features == 0) return kOk;
    using Few = FewTokens<decltype(word)>;
    if (Few::supports(p)) return Few(p).run() ? kOk : kOutOfMemory;
    return Layer(p).run() ? kOk : kOutOfMemory;
  });
}

int dropout(const DropoutParams& p) { return drop_hidden(p) ? kOk : kOutOfMemory; }

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// GFLOP/s of the micro-kernel on a problem that stays in the first-level cache: the peak the kernels are held against.
double gemm_rate(int64_t dtype, int64_t repeats) {
  return with_word(dtype, [&](auto word) {
    using Word = decltype(word);
    constexpr int kRows = 2 * kMicroRows, kColumns = kMicroVectors * kV, kWords = 64;
    std::vector<float> a(kRows * kWords, 0.0f), b(kColumns * kWords, 0.0f), c(kRows * kColumns);
    double best = 0.0;
    for (int attempt = 0; attempt < 5; attempt++) {
      const double start = thread_seconds();
      for (int64_t i = 0; i < repeats; i++)
        gemm<Word>(kRows, kMicroVectors, kWords, {a.data(), kWords, 1}, {b.data(), kWords * kV, kV}, c.data(), kColumns,
                   false);
      const double seconds = thread_seconds() - start;
      best = std::max(best, 2.0 * kRows * kColumns * kWords * Word::kPerWord * repeats / seconds * 1e-9);
    }
    return best;
  });
}

}  // namespace

namespace dk {

extern const Variant DK_CONCAT(kVariant_, DK_VARIANT);
const Variant DK_CONCAT(kVariant_, DK_VARIANT) = {
    DK_STRING(DK_VARIANT), kV, forward, backward, prepared_bytes, prepare, linear, dropout, checksum, gemm_rate};

}  // namespace dk
