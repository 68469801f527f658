// One block of an emulated device: its threads, shared memory, barriers, copy engine and tensor cores.
#pragma once
#include <cmath>

#include "in_flight.h"
#include "tensor_core.h"

namespace emulation {

class Machine {
 public:
  std::vector<std::pair<uint64_t, uint64_t>> readable, writable;  // [begin, end) of global memory
  BankReport banks;

  // Not 0 and, like a device's, a multiple of 1024 only.
  static constexpr uint32_t kSharedBase = 1024;

  std::string run(int block, int threads, uint32_t shared_bytes, const std::function<void()>& body, uint64_t seed) {
    block_ = block, threads_ = threads;
    shared_.reset(kSharedBase, shared_bytes);
    clocks_.assign(kWarps, Clock());
    for (int i = 0; i < kWarps; i++) clocks_[i].seen[i] = 1;
    epochs_.assign(kWarps, 1);
    fences_.assign(threads, 0);
    meetings_ = std::vector<Meeting>(kWarps);
    product_gates_ = std::vector<Meeting>(kWarps / 4);
    products_ = std::vector<ProductThread>(threads);
    barriers_.clear();
    named_.clear();
    copies_.clear();
    reductions_.assign(threads, {});
    traces_.assign(threads, {});
    std::string error = fibers_.run(
        threads, [&](int) { body(); }, [this] { return run_copy(); }, seed);
    for (const ProductThread& thread : products_) {
      if (error.empty() && !(thread.open.empty() && thread.groups.empty())) error = "ends with unfinished products";
    }
    if (error.empty() && !copies_.empty()) error = "ends with unfinished copies";
    for (const Reductions& thread : reductions_) {
      if (error.empty() && !(thread.open.empty() && thread.committed.empty() && thread.read.empty())) {
        error = "ends with unfinished reductions";
      }
    }
    return error;
  }

  int thread() const { return fibers_.current(); }
  void make_late(int warpgroup) { fibers_.make_late(warpgroup); }
  int block() const { return block_; }
  int threads() const { return threads_; }
  [[noreturn]] void fail(const std::string& message) { fibers_.fail(message); }
  void require(const std::string& problem, const char* where) {
    if (!problem.empty()) fail(std::string(where) + ": " + problem);
  }

  // ---- Global memory

  void check_global(const void* address, size_t size, bool write) {
    const uint64_t first = (uint64_t)address;
    if (first % size) fail("misaligned global address");
    const auto& ranges = write ? writable : readable;
    for (const auto& range : ranges) {
      if (first >= range.first && first + size <= range.second) return;
    }
    fail(write ? "store outside of the outputs" : "load outside of the inputs");
  }

  // ---- Shared memory

  uint8_t* shared_access(uint32_t address, uint32_t size, bool write) {
    require(shared_.range(address, size), "shared memory");
    const int t = thread();
    const Accessor who{t / kWarp, t % kWarp, epochs_[t / kWarp]};
    for (uint32_t a = address; a < address + size; a += 4) {
      require(write ? shared_.write(a, who, clocks_[who.agent], fences_[t], size == 2)
                    : shared_.read(a, who, clocks_[who.agent], clocks_[who.agent].seen[who.agent], fences_),
              "shared memory");
    }
    traces_[t].push_back(Access{address, size, write});
    return shared_.at(address);
  }
  void fence() { fences_[thread()]++; }

  // ---- Meetings of a warp

  const std::array<uint64_t, 32>& meet(const char* what, uint64_t value, bool barrier = false) {
    const int t = thread(), w = t / kWarp;
    Meeting& meeting = meetings_[w];
    if (meeting.arrived == 0) meeting.what = what;
    if (std::string(meeting.what) != what) fail(std::string(what) + " meets " + meeting.what + " of another lane");
    meeting.given[t % kWarp] = value;
    if (++meeting.arrived == kWarp) {
      meeting.arrived = 0;
      meeting.result = meeting.given;
      if (barrier) begin_epoch(w);
      meeting.gate.passed++;
    } else {
      fibers_.wait(meeting.gate, what);
    }
    return meeting.result;  // the lanes of a warp run before any of them can complete the next meeting
  }

  // ---- Barriers

  void sync_threads(int number, int count) {
    const int w = thread() / kWarp;
    NamedBarrier& barrier = named_[number];
    if (number < 0 || number > 15 || count % kWarp || count > threads_) fail("no such barrier");
    if (barrier.arrived && barrier.expected != count) fail("a barrier with two numbers of threads");
    barrier.expected = count;
    barrier.warps.insert(w);
    if (++barrier.arrived < count) return fibers_.wait(barrier.gate, "a barrier");
    Clock all;
    for (int warp : barrier.warps) all.join(clocks_[warp]);
    for (int warp : barrier.warps) clocks_[warp] = all, begin_epoch(warp);
    barrier.arrived = 0;
    barrier.warps.clear();
    barrier.gate.passed++;
  }

  void barrier_init(uint32_t address, int arrivals) {
    require(shared_.range(address, 8), "mbarrier");
    if (barriers_.count(address)) fail("an mbarrier initialised twice");
    if ((int)barriers_.size() == kAgents - kWarps) fail("too many mbarriers for the emulation");
    TransactionBarrier& barrier = barriers_[address];
    barrier.index = (int)barriers_.size() - 1;
    barrier.expected = arrivals;
  }
  TransactionBarrier& barrier_at(uint32_t address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) fail("no mbarrier at this address");
    return found->second;
  }
  void barrier_arrive(uint32_t address, int64_t bytes) {
    const int w = thread() / kWarp;
    TransactionBarrier& barrier = barrier_at(address);
    if (barrier.arrivals == barrier.expected) fail("more arrivals than the mbarrier expects");
    barrier.arrivals++, barrier.bytes += bytes;
    barrier.pending.join(clocks_[w]);
    clocks_[w].seen[w]++;
    complete(barrier);
  }
  void barrier_wait(uint32_t address, uint32_t parity) {
    TransactionBarrier& barrier = barrier_at(address);
    while ((barrier.phase & 1) == (parity & 1)) fibers_.wait(barrier.gate, "an mbarrier");
    clocks_[thread() / kWarp].join(barrier.released);
  }

  // ---- Copies

  void copy(uint32_t target, const dk::TensorMap& map, uint32_t barrier, std::array<int, 5> coordinates, int rank) {
    const int t = thread(), w = t / kWarp;
    const MapContent* content = reinterpret_cast<const MapContent*>(&map);
    if ((int)content->rank != rank) fail("a tensor map of another rank, or none");
    if ((uint64_t)&map % 64) fail("misaligned tensor map");
    if (target % 1024) fail("a swizzled tile must start at a multiple of 1024 bytes");
    uint32_t bytes = 2;
    for (int i = 0; i < rank; i++) bytes *= content->box[i];
    TransactionBarrier& signal = barrier_at(barrier);
    clocks_[w].seen[kWarps + signal.index] = ++signal.copies;
    const Accessor who{kWarps + signal.index, -1, 0};
    for (uint32_t a = target; a < target + bytes; a += 4) {
      require(shared_.range(a, 4), "copy");
      require(shared_.write(a, who, clocks_[w], 0), "copy");
    }
    std::memset(shared_.at(target), 0xff, bytes);
    copies_.push_back(Copy{content, target, barrier, bytes, coordinates, clocks_[w]});
    clocks_[w].seen[kWarps + signal.index] = 0;  // it has asked for the copy, it does not know that it is done
  }

  // ---- Reductions: each reads its shared memory, and adds it to global memory, when the thread waits for it

  void reduce(float* target, uint32_t source, int bytes) {
    const int t = thread();
    if ((uint64_t)target % 16 || source % 16 || bytes % 16 || bytes <= 0) fail("a misaligned reduction");
    require(shared_.range(source, 4), "reduction");
    require(shared_.range(source + bytes - 4, 4), "reduction");
    for (int i = 0; i < bytes / 4; i++) check_global(target + i, 4, true);
    reductions_[t].open.push_back({target, source, bytes, Accessor{t / kWarp, -1, epochs_[t / kWarp]}, clocks_[t / kWarp]});
  }
  void reduce_commit() {
    Reductions& state = reductions_[thread()];
    for (const Reduction& reduction : state.open) state.committed.push_back(reduction);
    state.open.clear();
  }
  // `done`: wait for the additions too. Those only read are added when they must be, or at the latest possible moment.
  void reduce_wait(bool done) {
    const int t = thread();
    Reductions& state = reductions_[t];
    if (!state.open.empty()) fail("a wait with reductions that were not committed");
    for (const Reduction& reduction : state.committed) {
      std::vector<float> values(reduction.bytes / 4);
      for (int i = 0; i < reduction.bytes; i += 4) {
        const uint32_t now = clocks_[t / kWarp].seen[t / kWarp];
        require(shared_.read(reduction.source + i, reduction.who, reduction.clock, now, fences_), "reduction");
        std::memcpy(&values[i / 4], shared_.at(reduction.source + i), 4);
      }
      state.read.push_back({reduction.target, std::move(values)});
    }
    state.committed.clear();
    if (!done) return;
    for (const auto& addition : state.read) {
      for (size_t i = 0; i < addition.second.size(); i++) addition.first[i] += addition.second[i];
    }
    state.read.clear();
  }

  // ---- Products

  void product_fence() { products_[thread()].fenced = true; }
  void product(Product product) {
    const int t = thread();
    ProductThread& state = products_[t];
    if (!state.fenced) fail("a product without a fence since the last wait");
    product.clock = clocks_[t / kWarp];
    float* d = product.accumulators;
    if (!state.values.count(d)) {
      state.counts[d] = product.columns / 2;
      std::copy(d, d + product.columns / 2, state.values[d].begin());
      std::fill(d, d + product.columns / 2, std::nanf(""));
    }
    state.open.push_back(product);
  }
  void product_commit() {
    ProductThread& state = products_[thread()];
    state.groups.push_back(std::move(state.open));
    state.open.clear();
  }
  void product_wait(int unfinished) {
    const int t = thread(), group = t / 128;
    if (!products_[t].open.empty()) fail("a wait with products that were not committed");
    Meeting& meeting = product_gates_[group];
    if (++meeting.arrived < 128) {
      fibers_.wait(meeting.gate, "its warpgroup at a wait for products");
    } else {
      meeting.arrived = 0;
      run_products(group * 128, unfinished);
      meeting.gate.passed++;
    }
    if (unfinished == 0) products_[t].fenced = false;
  }

 private:
  struct Access {
    uint32_t address, size;
    bool write;
  };
  struct Reductions {
    std::vector<Reduction> open, committed;
    std::vector<std::pair<float*, std::vector<float>>> read;
  };

  void begin_epoch(int warp) {
    epochs_[warp]++;
    clocks_[warp].seen[warp]++;
    count_banks(warp);
  }

  // Lanes that did the same accesses since the last barrier did them together.
  void count_banks(int warp) {
    const size_t length = traces_[warp * kWarp].size();
    bool together = true;
    for (int lane = 0; lane < kWarp; lane++) together &= traces_[warp * kWarp + lane].size() == length;
    for (size_t i = 0; together && i < length; i++) {
      std::vector<uint32_t> addresses;
      const Access& first = traces_[warp * kWarp][i];
      for (int lane = 0; lane < kWarp; lane++) addresses.push_back(traces_[warp * kWarp + lane][i].address);
      const int degree = Banks::degree(addresses, first.size);
      if (first.write && first.size == 4) banks.store = std::max(banks.store, degree);
      if (first.write && first.size == 2) banks.half = std::max(banks.half, degree);
      if (!first.write && first.size == 8) banks.load = std::max(banks.load, degree);
    }
    for (int lane = 0; lane < kWarp; lane++) traces_[warp * kWarp + lane].clear();
  }

  void complete(TransactionBarrier& barrier) {
    if (barrier.arrivals < barrier.expected || barrier.bytes > 0) return;
    barrier.released.join(barrier.pending);
    barrier.arrivals = 0;
    barrier.phase++;
    barrier.gate.passed++;
  }

  bool run_copy() {
    if (copies_.empty()) return false;
    const Copy copy = copies_.front();
    copies_.pop_front();
    const MapContent& map = *copy.map;
    std::array<uint32_t, 5> at{};
    for (uint32_t offset = 0; offset < copy.bytes; offset += 2) {
      uint64_t source = map.address;
      bool inside = true;
      for (uint32_t i = 0; i < map.rank; i++) {
        const int64_t x = (int64_t)copy.coordinates[i] + at[i];
        inside &= x >= 0 && x < map.elements[i];
        source += x * map.strides[i];
      }
      uint8_t* target = shared_.at(swizzle_128(copy.target + offset));
      if (inside) std::memcpy(target, reinterpret_cast<const void*>(source), 2);
      else std::memset(target, 0, 2);
      for (uint32_t i = 0; i < map.rank && ++at[i] == map.box[i]; i++) at[i] = 0;
    }
    TransactionBarrier& barrier = barriers_[copy.barrier];
    barrier.pending.join(copy.clock);
    barrier.bytes -= copy.bytes;
    complete(barrier);
    return true;
  }

  void run_products(int first_thread, int unfinished) {
    const size_t groups = products_[first_thread].groups.size();
    for (int t = first_thread; t < first_thread + 128; t++) {
      if (products_[t].groups.size() != groups) fail("threads of a warpgroup issued different products");
    }
    for (size_t i = unfinished; i < groups; i++) {
      const size_t count = products_[first_thread].groups.front().size();
      for (size_t op = 0; op < count; op++) run_product(first_thread, op);
      for (int t = first_thread; t < first_thread + 128; t++) products_[t].groups.pop_front();
    }
    for (int t = first_thread; t < first_thread + 128; t++) return_accumulators(products_[t]);
  }

  // Give the program its accumulators back, except those that unfinished products use.
  void return_accumulators(ProductThread& state) {
    std::set<float*> busy;
    for (const auto& group : state.groups) {
      for (const Product& product : group) busy.insert(product.accumulators);
    }
    for (auto it = state.values.begin(); it != state.values.end();) {
      if (busy.count(it->first)) {
        ++it;
      } else {
        const int count = state.counts[it->first];
        for (int i = 0; i < count; i++) {
          if (it->first[i] == it->first[i]) fail("accumulators changed while their product may still run");
        }
        std::copy(it->second.begin(), it->second.begin() + count, it->first);
        it = state.values.erase(it);
      }
    }
  }

  float value(Format format, uint16_t bits) {
    return format == Format::kBFloat16 ? bfloat16_value(bits) : float16_value(bits);
  }

  // Read an element of an operand in shared memory on behalf of all warps that need it.
  float operand(const Product& product, uint64_t bits, int row, int k, bool k_contiguous, int first_warp, int warps) {
    const uint32_t address = element_address(Descriptor(bits), row, k, k_contiguous);
    require(shared_.range(address, 2), "operand");
    if (address % 4 == 0) {
      for (int w = first_warp; w < first_warp + warps; w++) {
        const Clock& clock = products_[w * kWarp].groups.front()[current_product_].clock;
        require(shared_.read(address, Accessor{w, -1, epochs_[w]}, clock, clocks_[w].seen[w], fences_), "operand");
      }
    }
    uint16_t element;
    std::memcpy(&element, shared_.at(address), 2);
    return value(product.format, element);
  }

  void check_descriptor(uint64_t bits) {
    const Descriptor d(bits);
    if (d.swizzle != 1 || d.base_offset != 0 || d.stride != 1024) fail("the emulation knows no such descriptor");
  }

  void run_product(int first_thread, size_t op) {
    current_product_ = op;
    const Product& product = products_[first_thread].groups.front()[op];
    const int first_warp = first_thread / kWarp;
    static thread_local float a[64][16], b[16][64];
    check_descriptor(product.second);
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < product.columns; n++) {
        b[k][n] = operand(product, product.second, n, k, !product.transposed, first_warp, 4);
      }
    }
    if (!product.from_registers) {
      check_descriptor(product.first);
      for (int m = 0; m < 64; m++) {
        for (int k = 0; k < 16; k++) {
          a[m][k] = operand(product, product.first, m, k, !product.first_transposed, first_warp + m / 16, 1);
        }
      }
    }
    for (int t = 0; t < 128; t++) {
      const Product& own = products_[first_thread + t].groups.front()[op];
      if (own.first != product.first || own.second != product.second || own.accumulate != product.accumulate ||
          own.from_registers != product.from_registers || own.transposed != product.transposed ||
          own.first_transposed != product.first_transposed || own.columns != product.columns) {
        fail("threads of a warpgroup issued different products");
      }
      for (int i = 0; i < 4 && own.from_registers; i++) {
        if (own.source[i] != own.registers[i]) fail("an operand changed while its product may still run");
        for (int half = 0; half < 2; half++) {
          a[operand_row(t, i)][operand_column(t, i, half)] =
              value(own.format, (uint16_t)(own.registers[i] >> 16 * half));
        }
      }
    }
    for (int t = 0; t < 128; t++) {
      const Product& own = products_[first_thread + t].groups.front()[op];
      std::array<float, 32>& d = products_[first_thread + t].values[own.accumulators];
      for (int i = 0; i < product.columns / 2; i++) {
        const int m = accumulator_row(t, i), n = accumulator_column(t, i);
        float sum = own.accumulate ? d[i] : 0.0f;
        for (int k = 0; k < 16; k++) sum += a[m][k] * b[k][n];
        d[i] = sum;
      }
    }
  }

  Fibers fibers_;
  SharedMemory shared_;
  int block_ = 0, threads_ = 0;
  size_t current_product_ = 0;
  std::vector<Clock> clocks_;
  std::vector<uint32_t> epochs_, fences_;
  std::vector<Meeting> meetings_, product_gates_;
  std::vector<ProductThread> products_;
  std::map<uint32_t, TransactionBarrier> barriers_;
  std::map<int, NamedBarrier> named_;
  std::deque<Copy> copies_;
  std::vector<Reductions> reductions_;
  std::vector<std::vector<Access>> traces_;
};

inline Machine machine;

}  // namespace emulation
