// Which part of an attention call a block computes.
#pragma once

#include <gpu/device.h>

#include "attention_grid.h"

namespace tformer::gpu {

struct Work {
  int64_t tile, head, split;
};

TFORMER_DEVICE Work work_of(const WorkGrid& grid, int64_t index) {
  Work work{0, 0, 0};
  if (grid.splits > 1) {
    work.split = index % grid.splits;
    index /= grid.splits;
  }
  const int64_t group = index / (grid.heads_together * grid.tiles), first = group * grid.heads_together;
  const int64_t rest = index - first * grid.tiles;
  const int64_t width = grid.heads - first < grid.heads_together ? grid.heads - first : grid.heads_together;
  work.tile = rest / width;
  work.head = first + rest % width;
  if (grid.last_tile_first) work.tile = grid.tiles - 1 - work.tile;
  return work;
}

// Packed sequences: their tiles of `rows` rows are counted through. Finds the sequence that has tile number `tile`,
// which becomes its number in the sequence; false past the last one. Called by whole warps.
TFORMER_DEVICE bool find_sequence(const int32_t* cu_seqlens, int64_t sequences, int rows, int64_t& tile, int64_t& b) {
  for (int64_t base = 0; base < sequences; base += kWarp) {
    const int64_t n = base + lane();
    const int count = n < sequences ? (cu_seqlens[n + 1] - cu_seqlens[n] + rows - 1) / rows : 0;
    int up_to = count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = shuffle_index(up_to, lane() - step);
      if (lane() >= step) up_to += other;
    }
    const uint32_t later = ballot(tile < up_to);
    if (later) {
      int first = 0;
      while (!(later >> first & 1)) ++first;
      tile -= shuffle_index(up_to - count, first);
      b = base + first;
      return true;
    }
    tile -= shuffle_index(up_to, kWarp - 1);
  }
  return false;
}

}  // namespace tformer::gpu
