// The past of memory, by chunks of 16 bytes, which is what most accesses move. A chunk whose elements have different
// pasts is split into one cell per element, until they are alike again.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace ptx {

constexpr unsigned kChunk = 16;

// A cell has `uint32_t parts`, which this sets: index + 1 of the first of its parts when it is split. All zeros is the
// past of memory that nobody has touched. `equal` compares the rest. Owner::copied is told of every cell that was
// copied.
template <class Cell, class Owner>
class Chunks {
 public:
  explicit Chunks(Owner& owner) : owner_(&owner) {}

  // `unit`: bytes of the smallest element, 1, 2, 4, 8 or 16.
  void reset(size_t bytes, unsigned unit) {
    unit_ = unit, per_chunk_ = kChunk / unit;
    cells_.reset(static_cast<Cell*>(calloc(bytes / kChunk + 2, sizeof(Cell))));  // untouched pages take no memory
    parts_.clear(), free_.clear();
  }

  // Call f(cell, first byte) for every cell of these bytes.
  template <class F>
  void for_each(uint64_t at, uint64_t bytes, F f) {
    for (uint64_t end = at + bytes; at < end;) {
      uint64_t chunk = at / kChunk, next = std::min(end, (chunk + 1) * kChunk);
      Cell& cell = cells_[chunk];
      if (cell.parts == 0 && next - at == kChunk) f(cell, at);
      else for_each_part(cell, at, next, f);
      at = next;
    }
  }

  // The cell of one byte.
  const Cell& at(uint64_t byte) const {
    const Cell& cell = cells_[byte / kChunk];
    return cell.parts ? parts_[cell.parts - 1 + byte % kChunk / unit_] : cell;
  }

 private:
  template <class F>
  [[gnu::noinline]] void for_each_part(Cell& cell, uint64_t at, uint64_t end, F f) {
    if (cell.parts == 0) split(cell);
    uint32_t first = cell.parts - 1;
    bool whole = end - at == kChunk;
    for (; at < end; at = at / unit_ * unit_ + unit_) f(parts_[first + at % kChunk / unit_], at);
    if (whole) unite(cell);
  }

  void split(Cell& cell) {
    uint32_t first = parts_.size();
    if (free_.empty()) {
      parts_.resize(first + per_chunk_);
    } else {
      first = free_.back();
      free_.pop_back();
    }
    parts_[first] = cell;
    for (unsigned i = 1; i < per_chunk_; i++) owner_->copied(parts_[first + i] = cell);
    cell = Cell();
    cell.parts = first + 1;
  }

  void unite(Cell& cell) {
    uint32_t first = cell.parts - 1;
    for (unsigned i = 1; i < per_chunk_; i++)
      if (!parts_[first].equal(parts_[first + i])) return;
    cell = parts_[first];
    free_.push_back(first);
  }

  struct Free {
    void operator()(void* memory) const { free(memory); }
  };
  Owner* owner_;
  unsigned unit_ = kChunk, per_chunk_ = 1;
  std::unique_ptr<Cell[], Free> cells_;
  std::vector<Cell> parts_;
  std::vector<uint32_t> free_;
};

}  // namespace ptx
