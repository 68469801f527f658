// Runs on the emulated processor: loads the library as the package does, and computes what proxy.cpp asks for.
//
//     worker LIBRARY: standard input and output are the pipes, file descriptor 3 is the shared memory
#include <dlfcn.h>
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "message.h"

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

static void* library;
template <class Signature>
static Signature* function(const char* name) {
  void* found = dlsym(library, name);
  if (!found) std::fprintf(stderr, "worker: %s\n", dlerror()), std::exit(1);
  return reinterpret_cast<Signature*>(found);
}

static void describe(Message& m) {
  m.abi_version = function<int64_t()>("dk_abi_version")();
  m.variants = function<int64_t()>("dk_variant_count")();
  std::snprintf(m.layouts, sizeof m.layouts, "%s", function<const char*()>("dk_layouts")());
  for (int64_t i = 0; i < m.variants; i++) {
    m.runs[i] = function<int(int64_t)>("dk_variant_runs")(i);
    std::snprintf(m.name[i], sizeof m.name[i], "%s", function<const char*(int64_t)>("dk_variant_name")(i));
  }
}

static int64_t compute(const char* name, Message& m) {
  return function<int(const void*, int64_t)>(name)(m.params, m.variant);
}

static void answer(Message& m) {
  using Team = void(void (*)(void*), void*, unsigned, unsigned);
  function<void(Team*)>("dk_set_team_runner")(m.has_team ? GOMP_parallel : nullptr);
  int64_t* extra = m.params + kExtra;
  switch (m.function) {
    case kDescribe:
      return describe(m);
    case kForwardCall:
      m.result = compute("dk_cpu_forward", m);
      return;
    case kBackwardCall:
      m.result = compute("dk_cpu_backward", m);
      return;
    case kLinearCall:
      m.result = compute("dk_cpu_linear", m);
      return;
    case kDropoutCall:
      m.result = compute("dk_cpu_dropout", m);
      return;
    case kPreparedBytesCall:
      m.result = function<int64_t(const void*, int64_t)>("dk_cpu_prepared_bytes")(m.params, m.variant);
      return;
    case kPrepareCall:
      m.result = function<int(const void*, int64_t, void*)>("dk_cpu_prepare")(m.params, m.variant, (void*)extra[0]);
      return;
    case kChecksumCall:
      function<void(const void*, int64_t, const void*, void*, int64_t)>("dk_cpu_checksum")(
          (void*)extra[0], extra[1], (void*)extra[2], (void*)extra[3], m.variant);
      return;
    case kGemmRateCall:
      m.rate = function<double(int64_t, int64_t, int64_t)>("dk_cpu_gemm_rate")(extra[0], extra[1], m.variant);
      return;
  }
}

int main(int, char** arguments) {
  library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "worker: %s\n", dlerror()), 1;
  void* shared = mmap(nullptr, kSharedBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, 3, 0);
  if (shared == MAP_FAILED) return std::perror("worker: mmap"), 1;
  char* base = static_cast<char*>(shared);
  Message& m = *static_cast<Message*>(shared);
  for (char byte; read(0, &byte, 1) == 1;) {
    for (int64_t i = 0; i < m.pointers; i++) m.params[m.pointer[i].word] = (int64_t)(base + m.pointer[i].offset);
    for (int64_t i = 0; i < m.guards; i++) mprotect(base + m.guard[i], kPage, PROT_NONE);
    answer(m);
    for (int64_t i = 0; i < m.guards; i++) mprotect(base + m.guard[i], kPage, PROT_READ | PROT_WRITE);
    if (write(1, &byte, 1) != 1) return 1;
  }
}
