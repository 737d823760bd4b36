// The CPU's tile registers (Intel AMX): eight of 16 rows of 64 bytes. What each instruction does: Intel SDM, volume 2,
// under its name.
#pragma once

#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

constexpr int kTileSide = 16;  // rows of a tile, and 32-bit elements of each
constexpr int kTileGroups = kTileSide * kTileSide;

#if TFORMER_HAS_TILES
// All eight tiles, whole, in force in this thread while this lives. Without one in force the CPU has less to save when
// threads take turns.
class TilesInForce {
 public:
  TilesInForce() {
    Config config = {};
    config.palette = 1;
    for (int n = 0; n < 8; ++n) config.row_bytes[n] = 64, config.rows[n] = kTileSide;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TilesInForce() { asm volatile("tilerelease" ::: "memory"); }
  TilesInForce(const TilesInForce&) = delete;
  TilesInForce& operator=(const TilesInForce&) = delete;

 private:
  struct Config {  // 64 bytes
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

// The compiler knows nothing of tiles: "memory" keeps its own loads and stores on their side of these.
template <int kTile>
TFORMER_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
TFORMER_INLINE void tile_load(const void* rows, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
TFORMER_INLINE void tile_store(void* rows, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(row_bytes), "i"(kTile) : "memory");
}
// sums (row r, column n) += products of the bf16 pairs (r, k) of `a` and (k, n) of `b`, for k from 0 to 15 in order.
template <int kSums, int kA, int kB>
TFORMER_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}
#endif

// The unit that multiplies tiles falls asleep some 0.4 us after its last product, and the next one waits 0.3 us for it
// (measured on Emerald Rapids). What takes that long calls this meanwhile, at places where no tile holds anything.
template <class P>
TFORMER_INLINE void keep_tiles_awake() {
#if TFORMER_HAS_TILES
  if constexpr (P::kTiles) tile_multiply_add<0, 4, 6>();
#endif
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
