// How the blocks of a grid share an attention call; also for host files.
#pragma once

#include <cstdint>

namespace tformer::gpu {

// Tiles x heads x splits in one dimension. Heads are taken a few at a time, as many as keep their keys and values in
// the L2 cache; within them tile by tile, costly ones first, so that the last blocks to finish are short.
struct WorkGrid {
  int64_t tiles, heads, heads_together, splits;
  bool last_tile_first;

  constexpr int64_t blocks() const { return tiles * heads * splits; }
};

}  // namespace tformer::gpu
