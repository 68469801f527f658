// Global memory: what the host allows a launch to touch, and the past of every element of it. Addresses are those of
// this process. Blocks run one after another, but nothing orders them: two blocks that touch the same element, one of
// them writing, are a race, unless both do so by atomic operations.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "clocks.h"
#include "program.h"
#include "shadow.h"

namespace ptx {

// What memory that nobody has written holds, by 2 bytes: a NaN in every type of floats that no computation yields. It is
// put there by who allocates, and tells what was never written across launches, views and work of the host.
constexpr uint16_t kUnwritten = 0xffa5;

// Mirrored in tools/ptx/machine.py.
struct Range {
  uint64_t begin, end;
  int32_t granule;  // bytes of an element: 1, 2 or 4
  int32_t writable;
};

class GlobalMemory {
 public:
  GlobalMemory(const Range* ranges, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      regions_.push_back({ranges[i], Chunks<Cell, GlobalMemory>(*this)});
      regions_.back().chunks.reset(ranges[i].end - ranges[i].begin + kChunk, ranges[i].granule);
    }
  }

  void start_block(int64_t number) { block_ = uint32_t(number + 1) & kBlockMask; }

  // Check bounds, then the past of an access. A store of `data` that is there already races with no other store of its
  // block, as in shared memory.
  void access(uint64_t at, unsigned bytes, const Access& access, bool write, bool atomic = false,
              const void* data = nullptr) {
    Region& region = find(at, bytes, access);
    uint64_t offset = at - region.range.begin / kChunk * kChunk;  // so that vectors are whole chunks
    if (!write || atomic) check_written(region, at, bytes, access);
    if (!write) {
      region.chunks.for_each(offset, bytes, [&](Cell& cell, uint64_t) { read_cell(cell, access, region, at); });
      return;
    }
    if (!region.range.writable)
      fault(access.lane, "%s to memory that is read only, at %s", access.verb, place(region, at).c_str());
    bool same = data != nullptr && memcmp(data, reinterpret_cast<const void*>(at), bytes) == 0;
    region.chunks.for_each(offset, bytes,
                           [&](Cell& cell, uint64_t) { write_cell(cell, access, atomic, same, region, at); });
  }

  std::string place(uint64_t at) const {
    for (const Region& region : regions_)
      if (at >= region.range.begin && at < region.range.end) return place(region, at);
    return "an address of no argument";
  }

  int64_t excused = 0;  // as in shared memory

 private:
  static constexpr uint32_t kBlockMask = 0x3fffffff, kAtomic = 1u << 30, kManyBlocks = 0x3fffffff;
  struct Cell {
    Record write;
    uint32_t write_block;  // number + 1, 0: nobody; with kAtomic
    Record read;
    uint32_t read_block;
    uint32_t parts;

    bool equal(const Cell& x) const {
      return write == x.write && write_block == x.write_block && read == x.read && read_block == x.read_block;
    }
  };
  friend class Chunks<Cell, GlobalMemory>;
  void copied(Cell&) {}

  struct Region {
    Range range;
    Chunks<Cell, GlobalMemory> chunks;
  };

  std::string place(const Region& region, uint64_t at) const {
    return "byte " + std::to_string(at - region.range.begin) + " of memory range " +
           std::to_string(&region - regions_.data());
  }

  Region& find(uint64_t at, unsigned bytes, const Access& access) {
    auto inside = [&](const Region& r) { return at >= r.range.begin && at + bytes <= r.range.end; };
    if (last_ < regions_.size() && inside(regions_[last_])) return regions_[last_];
    const Region* nearest = nullptr;
    for (Region& region : regions_) {
      if (inside(region)) return last_ = &region - regions_.data(), region;
      if (at >= region.range.begin && (!nearest || region.range.begin > nearest->range.begin)) nearest = &region;
    }
    if (!nearest) fault(access.lane, "%s out of range: %u bytes at 0x%llx", access.verb, bytes, (unsigned long long)at);
    fault(access.lane, "%s out of range: %u bytes at byte %llu of memory range %d, which has %llu", access.verb, bytes,
          (unsigned long long)(at - nearest->range.begin), int(nearest - regions_.data()),
          (unsigned long long)(nearest->range.end - nearest->range.begin));
  }

  // Whether one of these elements holds nothing but what new memory holds.
  void check_written(const Region& region, uint64_t at, unsigned bytes, const Access& access) const {
    if (!looks_unwritten(at, bytes)) return;
    unsigned granule = region.range.granule;
    for (uint64_t element = at / granule * granule; element < at + bytes; element += granule) {
      bool written = false;
      for (uint64_t byte = element; byte < element + granule; byte++)
        written |= *reinterpret_cast<const uint8_t*>(byte) != (byte & 1 ? kUnwritten >> 8 : kUnwritten & 0xff);
      if (!written)
        fault(access.lane, "%s of memory that nobody wrote, at %s", access.verb, place(region, element).c_str());
    }
  }

  // Quick, and true too often: some two bytes look so, or one that is alone.
  static bool looks_unwritten(uint64_t at, unsigned bytes) {
    const uint8_t* memory = reinterpret_cast<const uint8_t*>(at);
    if (bytes == 1 || at & 1) return true;
    bool found = false;
    for (unsigned i = 0; i < bytes; i += 2) {
      uint16_t pair;
      memcpy(&pair, memory + i, 2);
      found |= pair == kUnwritten;
    }
    return found;
  }

  void read_cell(Cell& cell, const Access& access, const Region& region, uint64_t at) {
    uint32_t writer = cell.write_block & ~kAtomic;
    if (writer && writer != block_) {
      fault(access.lane, "race: %s of what block %u wrote, at %s", access.verb, writer - 1, place(region, at).c_str());
    } else if (writer && !access.after_write(cell.write)) {
      conflict(access, region, at, cell.write, "wrote");
    }
    if (cell.read_block != block_) cell.read_block = cell.read_block ? kManyBlocks : block_;
    cell.read = access.record;
  }

  void write_cell(Cell& cell, const Access& access, bool atomic, bool same, const Region& region, uint64_t at) {
    uint32_t writer = cell.write_block & ~kAtomic;
    bool both = atomic && (cell.write_block & kAtomic);
    if (writer && !both) {
      if (writer != block_)
        fault(access.lane, "race: %s over what block %u wrote, at %s", access.verb, writer - 1,
              place(region, at).c_str());
      if (!access.after_write(cell.write)) {
        if (!same) conflict(access, region, at, cell.write, "wrote");
        excused++;
      }
    }
    if (cell.read_block && cell.read_block != block_)
      fault(access.lane, "race: %s over what another block reads, at %s", access.verb, place(region, at).c_str());
    if (cell.read_block && !access.after(cell.read)) conflict(access, region, at, cell.read, "read");
    cell.write = access.record, cell.write_block = block_ | (atomic ? kAtomic : 0);
  }

  [[noreturn, gnu::cold]] void conflict(const Access& access, const Region& region, uint64_t at, Record other,
                                        const char* did) {
    fault(access.lane, "race: %s at %s, which warp %d %s and nothing orders the two", access.verb,
          place(region, at).c_str(), agent_of(other), did);
  }

  std::vector<Region> regions_;
  size_t last_ = 0;
  uint32_t block_ = 0;
};

}  // namespace ptx
