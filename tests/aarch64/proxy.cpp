// A library with the C interface of the native one that computes nothing: it hands each call to worker.cpp, which runs
// the library for aarch64 under emulation. With it in DEBERTA_KERNELS_LIBRARY the tests that Python runs here hold the
// library for the other processor to the same bounds.
//
// EMULATED_WORKER is the command that starts the worker, words between blanks.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <string>

#include "areas.h"

using namespace dk;

namespace {

constexpr int64_t kWorkerDied = 100;

class Worker {
 public:
  // Run a call. A forked child has a worker of its own.
  template <class Fill>
  int64_t call(Function function, int64_t variant, Areas areas, const Fill& fill) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (owner_ != getpid() && !start()) return kWorkerDied;
    Message& m = *message_;
    m.function = function;
    m.variant = variant;
    m.has_team = has_team;
    fill(m);
    if (!areas.send(m)) return kOutOfMemory;
    if (!exchange()) return kWorkerDied;
    areas.receive(m);
    if (m.guards && m.guard[m.guards - 1] > kKept) release();
    return m.result;
  }
  const Message& message() const { return *message_; }
  bool has_team = false;

 private:
  static constexpr int64_t kKept = 64 << 20;

  bool start() {
    const char* command = std::getenv("EMULATED_WORKER");
    if (!command) return std::fprintf(stderr, "proxy: EMULATED_WORKER is not set\n"), false;
    memory_ = memfd_create("deberta_kernels", MFD_CLOEXEC);
    int to[2], from[2];
    if (memory_ < 0 || ftruncate(memory_, kSharedBytes) || pipe2(to, O_CLOEXEC) || pipe2(from, O_CLOEXEC)) return false;
    void* shared = mmap(nullptr, kSharedBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory_, 0);
    if (shared == MAP_FAILED) return false;
    message_ = static_cast<Message*>(shared);
    std::istringstream words(command);
    std::vector<std::string> text;
    for (std::string word; words >> word;) text.push_back(word);
    std::vector<char*> arguments;
    for (std::string& word : text) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      const int kept = fcntl(memory_, F_DUPFD, 10);
      dup2(to[0], 0), dup2(from[1], 1), dup2(kept, 3);
      unsetenv("LD_PRELOAD");
      execvp(arguments[0], arguments.data());
      std::perror("proxy: EMULATED_WORKER");
      _exit(127);
    }
    close(to[0]), close(from[1]);
    request_ = to[1], reply_ = from[0], owner_ = getpid();
    return child > 0;
  }

  bool exchange() {
    char byte = 0;
    if (write(request_, &byte, 1) == 1 && read(reply_, &byte, 1) == 1) return true;
    std::fprintf(stderr, "proxy: the worker died in function %lld\n", (long long)message_->function);
    owner_ = 0;
    return false;
  }

  // Give back the memory of a large call.
  void release() {
    fallocate(memory_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, kFirstArea, kSharedBytes - kFirstArea);
  }

  std::mutex mutex_;
  Message* message_ = nullptr;
  int memory_ = -1, request_ = -1, reply_ = -1;
  pid_t owner_ = 0;
};

Worker worker;

template <class Params>
int64_t call(Function function, const Params* p, int64_t variant, void* packed = nullptr, int64_t bytes = 0) {
  static_assert(sizeof(Params) <= kExtra * sizeof(int64_t), "");
  if (!p || p->abi_version != kAbiVersion) return kBadAbi;
  Areas areas = areas_of(*p);
  areas.add(kExtra, packed, bytes, true);
  return worker.call(function, variant, areas, [&](Message& m) { std::memcpy(m.params, p, sizeof *p); });
}

// What the library says of itself.
const Message& described() {
  static const Message answer = [] {
    if (worker.call(kDescribe, 0, Areas(), [](Message&) {}) == kWorkerDied) std::exit(1);
    return worker.message();
  }();
  return answer;
}

}  // namespace

#define DK_EXPORT extern "C" __attribute__((visibility("default")))

DK_EXPORT int64_t dk_abi_version() { return described().abi_version; }
DK_EXPORT const char* dk_layouts() { return described().layouts; }
DK_EXPORT void dk_set_team_runner(TeamRunner team) { worker.has_team = team; }
DK_EXPORT int64_t dk_variant_count() { return described().variants; }
DK_EXPORT const char* dk_variant_name(int64_t i) { return described().name[i]; }
DK_EXPORT int dk_variant_runs(int64_t i) { return (int)described().runs[i]; }

DK_EXPORT int dk_cpu_forward(const AttentionParams* p, int64_t variant) { return (int)call(kForwardCall, p, variant); }
DK_EXPORT int dk_cpu_backward(const AttentionParams* p, int64_t variant) {
  return (int)call(kBackwardCall, p, variant);
}
DK_EXPORT int dk_cpu_linear(const LinearParams* p, int64_t variant) { return (int)call(kLinearCall, p, variant); }
DK_EXPORT int dk_cpu_dropout(const DropoutParams* p, int64_t variant) { return (int)call(kDropoutCall, p, variant); }
DK_EXPORT int64_t dk_cpu_prepared_bytes(const AttentionParams* p, int64_t variant) {
  return worker.call(kPreparedBytesCall, variant, Areas(), [&](Message& m) { std::memcpy(m.params, p, sizeof *p); });
}
DK_EXPORT int dk_cpu_prepare(const AttentionParams* p, int64_t variant, void* packed) {
  return (int)call(kPrepareCall, p, variant, packed, dk_cpu_prepared_bytes(p, variant));
}
DK_EXPORT int64_t dk_checksum_key_bytes() { return kChecksumKeyBytes; }
DK_EXPORT void dk_cpu_checksum(const char* data, int64_t bytes, const char* key, uint64_t* result, int64_t variant) {
  Areas areas;
  areas.add(kExtra, data, bytes);
  areas.add(kExtra + 2, key, kChecksumKeyBytes);
  areas.add(kExtra + 3, result, 2 * sizeof *result, true);
  worker.call(kChecksumCall, variant, areas, [&](Message& m) { m.params[kExtra + 1] = bytes; });
}
DK_EXPORT double dk_cpu_gemm_rate(int64_t dtype, int64_t repeats, int64_t variant) {
  worker.call(kGemmRateCall, variant, Areas(), [&](Message& m) {
    m.params[kExtra] = dtype;
    m.params[kExtra + 1] = repeats;
  });
  return worker.message().rate;
}
