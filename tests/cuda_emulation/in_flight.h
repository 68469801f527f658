// What is under way in a block: meetings and barriers, copies, products.
#pragma once
#include <deque>

#include "fibers.h"
#include "params.h"
#include "shared_memory.h"

namespace emulation {

// What cuTensorMapEncodeTiled was told, kept in the bytes of a map.
struct MapContent {
  uint64_t address;
  uint32_t rank, elements[5], box[5];
  uint64_t strides[5];  // bytes
};
static_assert(sizeof(MapContent) <= sizeof(dk::TensorMap), "a tensor map has 128 bytes");

enum class Format { kBFloat16, kFloat16 };

// A product that was issued and may not have run yet.
struct Product {
  Format format;
  float* accumulators;
  int columns;
  bool accumulate, first_transposed, transposed, from_registers;
  uint32_t registers[4];
  const uint32_t* source;  // of `registers`, to see that they stay
  uint64_t first, second;
  Clock clock;
};

// A reduction that was asked for and may not have run yet.
struct Reduction {
  float* target;
  uint32_t source;
  int bytes;
  Accessor who;
  Clock clock;
};

struct ProductThread {
  std::vector<Product> open;                       // not committed yet
  std::deque<std::vector<Product>> groups;         // committed, not run yet
  std::map<float*, std::array<float, 32>> values;  // of accumulators with unfinished products; the program sees NaN
  std::map<float*, int> counts;                    // of their registers
  bool fenced = false;
};

struct Meeting {
  Gate gate;
  int arrived = 0;
  const char* what = "";
  std::array<uint64_t, 32> given{}, result{};
};

struct NamedBarrier {
  Gate gate;
  int arrived = 0, expected = 0;
  std::set<int> warps;
};

struct TransactionBarrier {
  Gate gate;
  int index = 0, expected = 0, arrivals = 0;
  int64_t bytes = 0;
  uint32_t phase = 0, copies = 0;
  Clock pending, released;
};

struct Copy {
  const MapContent* map;
  uint32_t target, barrier, bytes;
  std::array<int, 5> coordinates;
  Clock clock;
};

// Worst number of words that met in a bank, in the accesses of the staging: stores of 4 and 2 bytes, loads of 8.
struct BankReport {
  int store = 0, half = 0, load = 0;
};

}  // namespace emulation
