// Threads of one block as fibers on one processor: each runs until it must wait for another, in a random order. Those of
// a warpgroup can be made late: they run only while no other thread and no copy can go on.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulation {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr size_t kStackBytes = 256 << 10;

// What a thread waits for: it goes on once `passed` counts more than it did when the thread began to wait.
struct Gate {
  uint64_t passed = 0;
};

class Fibers {
 public:
  // Run body(thread) for each thread; idle() does what is left to do besides (copies in flight), and says whether it did
  // anything. Returns "" or what went wrong.
  std::string run(int threads, const std::function<void(int)>& body, const std::function<bool()>& idle, uint64_t seed) {
    body_ = &body;
    error_.clear();
    random_.seed(seed);
    fibers_.clear();
    fibers_.resize(threads);
    std::vector<int> order(threads);
    for (int i = 0; i < threads; i++) {
      order[i] = i;
      Fiber& fiber = fibers_[i];
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Fibers::enter), 0);
    }
    running_ = this;
    do std::shuffle(order.begin(), order.end(), random_);
    while (turn(order, idle, false) || (error_.empty() && idle()) || turn(order, idle, true));
    for (int i = 0; i < threads && error_.empty(); i++) {
      if (!fibers_[i].done) error_ = "deadlock: thread " + std::to_string(i) + " waits at " + fibers_[i].where;
    }
    return error_;
  }

  int current() const { return current_; }
  // Make the threads of a warpgroup late; none with -1.
  void make_late(int warpgroup) { late_ = warpgroup; }

  // Called by a thread: wait until the gate is passed again.
  void wait(Gate& gate, const char* where) {
    Fiber& fiber = fibers_[current_];
    fiber.gate = &gate, fiber.seen = gate.passed, fiber.where = where;
    swapcontext(&fiber.context, &scheduler_);
  }

  // Called by a thread: stop the block.
  [[noreturn]] void fail(const std::string& message) {
    error_ = "thread " + std::to_string(current_) + ": " + message;
    swapcontext(&fibers_[current_].context, &scheduler_);
    abort();
  }
  // Called outside of threads.
  void note(const std::string& message) {
    if (error_.empty()) error_ = message;
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Gate* gate = nullptr;
    uint64_t seen = 0;
    const char* where = "its start";
    bool done = false;
  };

  // Let each thread that can run do so once, only the late ones or only the others. Returns whether any did.
  bool turn(const std::vector<int>& order, const std::function<bool()>& idle, bool late) {
    bool any = false;
    for (int thread : order) {
      Fiber& fiber = fibers_[thread];
      if (!error_.empty()) return false;
      if ((thread / kWarpgroup == late_) != late || fiber.done) continue;
      if (fiber.gate && fiber.gate->passed == fiber.seen) continue;
      any = true;
      fiber.gate = nullptr;
      current_ = thread;
      swapcontext(&scheduler_, &fiber.context);
      if (error_.empty() && random_() % 4 == 0) idle();
    }
    return any && error_.empty();
  }

  static void enter() {
    Fibers& self = *running_;
    const int thread = self.current_;
    (*self.body_)(thread);
    self.fibers_[thread].done = true;
  }

  inline static Fibers* running_ = nullptr;
  const std::function<void(int)>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  std::mt19937_64 random_;
  std::string error_;
  int current_ = 0, late_ = -1;
};

}  // namespace emulation
