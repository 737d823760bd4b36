// How the backward kernels for sm_90a share a call.
#pragma once

#include <gpu/hopper.h>

#include "../attention_backward.h"
#include "attention_launch.h"

namespace tformer::gpu {

// Registers of a thread: dk and dv, kWidth / 2 each; scores and their gradients, kQueries / 2 each, and as operands
// kQueries / 4 each. Shared memory: keys, values; two tiles of queries, of do, and of gradients of scores; sums of dq.
template <int kWidth>
struct HopperBackwardShape {
  static constexpr int kGroups = 2, kKeys = 64 * kGroups;
  static constexpr int kQueries = hopper_backward_queries(kWidth);
  // of the 168 each that a block of 384 threads is launched with
  static constexpr int kFetchRegisters = 24, kRegisters = 240;
  static_assert(kFetchRegisters + kGroups * kRegisters <= (1 + kGroups) * 168);
};

// Floats of dq that a warpgroup adds up at a time, and those of a tile of queries. They lie as threads hold them: chunk
// n of 16 bytes of thread t at 128 n + t, 64 x 64 after 64 x 64 along rows or columns, whichever are more.
constexpr int kSumFloats = 64 * 64, kSumChunks = kSumFloats / 4 / kWarpgroup, kTileFloats = 2 * kSumFloats;
static_assert(kTileFloats == kHopperSlotFloats);

// Where the sums of a tile of queries lie, and its turn. Packed sequences: their tiles are counted as find_sequence
// does, up to a gap after each sequence.
TFORMER_DEVICE int slot_of(const AttentionCall& call, int q_begin, int b, int h, int i0) {
  const int rows = hopper_backward_queries(static_cast<int>(call.p.D > call.p.Dv ? call.p.D : call.p.Dv));
  const int first = call.packed ? q_begin / rows + b : 0, tiles = static_cast<int>(hopper_query_tiles(call, rows));
  return (call.packed ? h : b * static_cast<int>(call.p.Hq) + h) * tiles + first + i0 / rows;
}

// What a block works on: a tile of keys, and the queries of each head that see some of them. It lies in shared memory
// and is read where it is wanted: registers are short.
struct HopperKeyTile {
  int b, kv_head, group_size, tile;
  int q_begin, k_begin, Sq, Sk;  // of the sequence
  int j0;                        // first key
  int first_tile, tiles;         // of queries
  int all_begin, all_end;        // queries that see all its keys
  uint32_t shown[4];             // what a mask by keys says of each

  TFORMER_DEVICE HopperKeyTile(const AttentionParams& p, int b_, int kv_head_, int tile_, int keys, int queries,
                               const uint32_t (&mask)[4])
      : b(b_), kv_head(kv_head_), group_size(static_cast<int>(p.Hq / p.Hk)), tile(tile_), j0(tile_ * keys) {
    const Positions seq(sequence_of(p, b));
    q_begin = seq.q_begin, k_begin = seq.k_begin, Sq = seq.Sq, Sk = seq.Sk;
    const KeyRangeOf<int> seen = range(p);
    const int j1 = smaller(j0 + keys, Sk), begin = seen.query_begin(j0);
    const int end = j0 < j1 ? seen.query_end(j1 - 1, Sq) : 0;
    first_tile = begin / queries;
    tiles = end > begin ? (end + queries - 1) / queries - first_tile : 0;
    all_begin = seen.query_begin(j0 + keys - 1),
    all_end = j0 + keys <= Sk && (mask[0] & mask[1] & mask[2] & mask[3]) == ~uint32_t{0} ? seen.query_end(j0, Sq) : 0;
    for (int n = 0; n < 4; ++n) shown[n] = mask[n];
  }
  TFORMER_DEVICE Sequence sequence() const { return {q_begin, k_begin, Sq, Sk}; }
  TFORMER_DEVICE KeyRangeOf<int> range(const AttentionParams& p) const { return {p, sequence()}; }
};

}  // namespace tformer::gpu
