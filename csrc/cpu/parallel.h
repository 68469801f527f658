// Tasks over threads with results that do not depend on how many threads there are.
#pragma once
#include <sched.h>

#include <atomic>
#include <memory>

#include "params.h"
#include "workspace.h"

namespace {

// Run work() on a team of threads, those that PyTorch has; on this thread alone where it has none.
template <class Work>
void run_team(int64_t threads, const Work& work) {
  const dk::TeamRunner team = dk::team_runner.load(std::memory_order_acquire);
  if (!team) return work();
  team([](void* data) noexcept { (*static_cast<const Work*>(data))(); }, const_cast<Work*>(&work), (unsigned)threads,
       0);
}

// Run body(task, block) for task = 0 ... tasks-1, each thread with its own `bytes` of scratch. Tasks start in order,
// which Turnstile relies on. Returns false when memory ran out; then the output is not complete.
template <class Body>
bool run_tasks(int64_t tasks, int64_t threads, int64_t bytes, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    static thread_local ThreadBlock scratch;
    if (next.load() >= tasks) return;
    char* block = scratch.get(bytes);
    if (!block) failed = true;
    for (int64_t task; block && (task = next.fetch_add(1)) < tasks;) body(task, block);
    scratch.trim();
  };
  if (threads <= 1 || tasks <= 1) {
    work();
  } else {
    // All threads, be there work for them or not: OpenMP ends those that a smaller team leaves out, and the next team,
    // ours or PyTorch's, would wait for new ones.
    run_team(threads, work);
  }
  // A thread without memory leaves its share to the others; only if none got any is work left over.
  return next.load() >= tasks || !failed;
}

// Lets the tasks of one group add to shared memory one after the other, in a fixed order.
class Turnstile {
 public:
  explicit Turnstile(int64_t groups) : turn_(new std::atomic<int64_t>[groups]) {
    for (int64_t g = 0; g < groups; g++) turn_[g] = 0;
  }
  template <class Body>
  void pass(int64_t group, int64_t turn, const Body& body) {
    while (turn_[group].load(std::memory_order_acquire) != turn) sched_yield();
    body();
    turn_[group].store(turn + 1, std::memory_order_release);
  }

 private:
  std::unique_ptr<std::atomic<int64_t>[]> turn_;
};

}  // namespace
