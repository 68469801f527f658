// How many cycles of shared memory, and how many sectors of global memory, one instruction of a warp takes.
#pragma once
#include <cstdint>

#include "program.h"

namespace ptx {

// Shared memory has 32 banks of 4 bytes and serves 128 bytes at a time: all lanes, or 16 of them at 8 bytes each, or 8
// at 16. In one wavefront a bank gives one word, to every lane that wants it.
inline void count_wavefronts(const uint32_t* at, uint32_t lanes, unsigned bytes, Count& count) {
  unsigned words = bytes <= 4 ? 1 : bytes / 4, group = kLanes / words;
  for (unsigned first = 0; first < kLanes; first += group) {
    uint32_t seen[kLanes][kLanes];
    uint8_t used[kLanes] = {0};
    unsigned worst = 0, distinct = 0;
    for (unsigned lane = first; lane < first + group; lane++) {
      if (!(lanes >> lane & 1)) continue;
      for (unsigned w = 0; w < words; w++) {
        uint32_t word = (at[lane] >> 2) + w, bank = word % kLanes;
        unsigned i = 0;
        while (i < used[bank] && seen[bank][i] != word) i++;
        if (i < used[bank]) continue;
        seen[bank][i] = word, distinct++;
        if (++used[bank] > worst) worst = used[bank];
      }
    }
    count.wavefronts += worst;
    count.needed += (distinct + kLanes - 1) / kLanes;
  }
}

inline void count_sectors(const uint64_t* at, uint32_t lanes, unsigned bytes, Count& count) {
  uint64_t seen[2 * kLanes], last = ~0ull;
  int n = 0;
  for (int lane = 0; lane < kLanes; lane++) {
    if (!(lanes >> lane & 1)) continue;
    for (uint64_t sector = at[lane] >> 5; sector <= (at[lane] + bytes - 1) >> 5; sector++) {
      if (sector == last) continue;
      last = sector;
      int i = 0;
      while (i < n && seen[i] != sector) i++;
      if (i == n) seen[n++] = sector;
    }
  }
  count.sectors += n;
  count.bytes += __builtin_popcount(lanes) * bytes;
}

}  // namespace ptx
