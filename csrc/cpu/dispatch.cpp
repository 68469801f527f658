// The C ABI of the library and the choice among the compiled instruction-set variants. Compiled for the baseline.
//
// csrc/native_build.py defines DK_VARIANTS(V): V(name, whether the processor has what it uses) of each variant that was
// compiled, fastest first, the generic one last. A processor's features are asked for as DK_HAS(name), with Linux's names.
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "layout.h"
#include "params.h"

#define DK_DECLARE(name, runs) extern const Variant kVariant_##name;
namespace dk {
DK_VARIANTS(DK_DECLARE)
std::atomic<TeamRunner> team_runner{nullptr};
}  // namespace dk

// libstdc++, which is linked in, asks whether it may count references without atomics; from glibc, that needs 2.32. Where
// it was compiled beside a newer glibc it also reads numbers by a name of 2.38, for a function as old as C.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
unsigned long old_strtoul(const char*, char**, int) __asm__("strtoul");
__attribute__((visibility("hidden"))) unsigned long __isoc23_strtoul(const char* text, char** end, int base) {
  return old_strtoul(text, end, base);
}
}

namespace {

using namespace dk;

#if defined(__x86_64__)
// Clang 14 does not know this name in __builtin_cpu_supports; beside AVX2 the bit is all there is to ask for.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

#if defined(__aarch64__) && defined(__linux__)
// The bits of Linux's asm/hwcap.h, whose older copies lack the last.
bool has_asimd() { return getauxval(AT_HWCAP) >> 1 & 1; }
bool has_atomics() { return getauxval(AT_HWCAP) >> 8 & 1; }
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_asimd() { return true; }
bool has_atomics() { return true; }
bool has_bf16() {
  int answer = 0;
  size_t size = sizeof answer;
  return !sysctlbyname("hw.optional.arm.FEAT_BF16", &answer, &size, nullptr, 0) && answer;
}
#elif defined(__aarch64__)
bool has_asimd() { return true; }
bool has_atomics() { return false; }
bool has_bf16() { return false; }
#endif

#define DK_HAS(feature) DK_HAS_##feature
#define DK_HAS_asimd has_asimd()
#define DK_HAS_atomics has_atomics()
#define DK_HAS_bf16 has_bf16()
#define DK_HAS_avx2 __builtin_cpu_supports("avx2")
#define DK_HAS_fma __builtin_cpu_supports("fma")
#define DK_HAS_f16c has_f16c()
#define DK_HAS_avx512f __builtin_cpu_supports("avx512f")
#define DK_HAS_avx512bw __builtin_cpu_supports("avx512bw")
#define DK_HAS_avx512vl __builtin_cpu_supports("avx512vl")
#define DK_HAS_avx512dq __builtin_cpu_supports("avx512dq")
#define DK_HAS_avx512_bf16 __builtin_cpu_supports("avx512bf16")

#define DK_ADDRESS(name, runs) &kVariant_##name,
const Variant* const kCompiled[] = {DK_VARIANTS(DK_ADDRESS)};
constexpr int64_t kCount = sizeof(kCompiled) / sizeof(kCompiled[0]);

// Asked once: a virtual machine takes microseconds to answer.
const bool* runs_here() {
#define DK_RUNS(name, runs) !!(runs),
  static const struct Answers {
    Answers() {
#if defined(__x86_64__)
      __builtin_cpu_init();
#endif
      const bool answers[] = {DK_VARIANTS(DK_RUNS)};
      for (int64_t i = 0; i < kCount; i++) found[i] = answers[i];
    }
    bool found[kCount];
  } answers;
  return answers.found;
}

const Variant* at(int64_t i) { return i >= 0 && i < kCount && runs_here()[i] ? kCompiled[i] : nullptr; }

}  // namespace

#define DK_EXPORT extern "C" __attribute__((visibility("default")))

DK_EXPORT int64_t dk_abi_version() { return kAbiVersion; }
// What the package compares with its own structs; see layout.h.
DK_EXPORT const char* dk_layouts() { return layouts().c_str(); }

// What runs teams of threads, before the first call; until then each call has one thread.
DK_EXPORT void dk_set_team_runner(TeamRunner team) { team_runner.store(team, std::memory_order_release); }

// Compiled variants, fastest first; `dk_variant_runs` says whether this processor can run one.
DK_EXPORT int64_t dk_variant_count() { return kCount; }
DK_EXPORT const char* dk_variant_name(int64_t i) { return i >= 0 && i < kCount ? kCompiled[i]->name : nullptr; }
DK_EXPORT int dk_variant_runs(int64_t i) { return at(i) != nullptr; }

namespace {

template <class Params>
bool fits(const Params&) {
  return true;
}
bool fits(const AttentionParams& p) { return p.head_dim <= kMaxHeadDim; }

template <class Params, class Run>
int guarded(const Params* p, int64_t variant, const Run& run) {
  if (!p || p->abi_version != kAbiVersion) return kBadAbi;
  const Variant* chosen = at(variant);
  if (!chosen || !fits(*p)) return kUnsupported;
  try {
    return run(*chosen);
  } catch (...) {  // only allocations can fail
    return kOutOfMemory;
  }
}

}  // namespace

DK_EXPORT int dk_cpu_forward(const AttentionParams* p, int64_t variant) {
  return guarded(p, variant, [&](const Variant& v) { return v.forward(*p); });
}
DK_EXPORT int dk_cpu_backward(const AttentionParams* p, int64_t variant) {
  return guarded(p, variant, [&](const Variant& v) { return v.backward(*p); });
}
DK_EXPORT int dk_cpu_prepare(const AttentionParams* p, int64_t variant, void* packed) {
  return guarded(p, variant, [&](const Variant& v) { return v.prepare(*p, packed); });
}
DK_EXPORT int64_t dk_cpu_prepared_bytes(const AttentionParams* p, int64_t variant) {
  int64_t bytes = -1;
  guarded(p, variant, [&](const Variant& v) {
    bytes = v.prepared_bytes(*p);
    return kOk;
  });
  return bytes;
}
DK_EXPORT int dk_cpu_linear(const LinearParams* p, int64_t variant) {
  return guarded(p, variant, [&](const Variant& v) { return v.linear(*p); });
}
DK_EXPORT int dk_cpu_dropout(const DropoutParams* p, int64_t variant) {
  return guarded(p, variant, [&](const Variant& v) { return v.dropout(*p); });
}
DK_EXPORT int64_t dk_checksum_key_bytes() { return kChecksumKeyBytes; }
DK_EXPORT void dk_cpu_checksum(const char* data, int64_t bytes, const char* key, uint64_t* result, int64_t variant) {
  const Variant* chosen = at(variant);
  (chosen ? chosen : kCompiled[kCount - 1])->checksum(data, bytes, key, result);
}
DK_EXPORT double dk_cpu_gemm_rate(int64_t dtype, int64_t repeats, int64_t variant) {
  const Variant* chosen = at(variant);
  return chosen ? chosen->gemm_rate(dtype, repeats) : -1.0;
}
