// As attention_forward.h, for few queries, as in decoding: a block's warps all have them and share the keys of a tile
// (Dao et al. 2023, Flash-Decoding, within a block, too). What counts is how much memory is under way.
#pragma once

#include "attention_forward_tile.h"

namespace tformer::gpu {

// Keys and values of two tiles are on their way or in use, 64 KB; three blocks fit a multiprocessor.
template <class T, int kWidth>
struct FewQueriesShape {
  static constexpr int kLaneRows = 2, kWarps = 4, kRowWarps = 1;
  static constexpr int kWarpRows = 8 * kLaneRows, kRows = kWarpRows;
  static constexpr int kKeys = 8192 / kWidth, kStages = 2;
};

// What has_few_queries says. What the warps have summed is merged in their order.
template <class T, int kWidth>
struct AttentionFewQueries : ForwardTile<T, kWidth, true, FewQueriesShape<T, kWidth>> {
  using Shape = FewQueriesShape<T, kWidth>;
  using Tile = ForwardTile<T, kWidth, true, Shape>;
  using Tile::b, Tile::key_begin, Tile::key_end, Tile::p, Tile::q, Tile::row0, Tile::scores;
  using Tile::kLaneRows, Tile::kKeys, Tile::kThreads;
  using typename Tile::KeyTile, typename Tile::P, typename Tile::QueryTile, typename Tile::R, typename Tile::Softmax;
  static constexpr int kStages = Shape::kStages, kWarpKeys = kKeys / Shape::kWarps, kO = kWidth / 4;
  static constexpr int kMinimumBlocks = 3;
  using WarpKeyTile = SharedTile<T, kWarpKeys, kWidth>;
  static constexpr size_t kSharedBytes = QueryTile::kBytes + 2 * kStages * KeyTile::kBytes;
  // What a warp leaves for the merge: of each row of a lane o, m, l.
  static constexpr int kPartFloats = kLaneRows * (kO + 2) * kWarp;
  static_assert((Shape::kWarps - 1) * kPartFloats * 4 <= 2 * kStages * KeyTile::kBytes);

  char* const stages;

  static TFORMER_DEVICE void run(const AttentionCall& call, char* shared) {
    run_forward_tile<AttentionFewQueries>(call, shared);
  }

  TFORMER_DEVICE AttentionFewQueries(const AttentionCall& call, int b_, int h, const Work& work, char* shared)
      : Tile(call, b_, h, work, shared), stages(shared + QueryTile::kBytes) {}

  TFORMER_DEVICE KeyTile keys(int stage) const { return {stages + 2 * stage * KeyTile::kBytes}; }
  TFORMER_DEVICE KeyTile values(int stage) const { return {stages + (2 * stage + 1) * KeyTile::kBytes}; }
  static TFORMER_DEVICE WarpKeyTile own(const KeyTile& tile) { return {tile.data + warp() * WarpKeyTile::kBytes}; }

  TFORMER_DEVICE void load(int key0, int stage) const {
    if (key0 < key_end) {
      Tile::load_keys(p.k, keys(stage), key0, p.D);
      Tile::load_keys(p.v, values(stage), key0, p.Dv);
    }
    copy_async_commit();
  }

  TFORMER_DEVICE void attend() const {
    R o[kLaneRows][kO];
    clear(o);
    Softmax softmax;
    Tile::load_queries();
#pragma unroll
    for (int n = 0; n < kStages; ++n) load(key_begin + n * kKeys, n);
    int stage = 0;
#pragma unroll 1
    for (int key0 = key_begin; key0 < key_end; key0 += kKeys) {
      copy_async_wait<kStages - 1>();
      sync_block();
      const int own0 = key0 + warp() * kWarpKeys;
      R s[kLaneRows][kWarpKeys / 4];
      clear(s);
      P::multiply_rows(s, q, 0, own(keys(stage)));
      if (own0 < Tile::all_begin || own0 + kWarpKeys > Tile::all_end) {
        finish_scores<P>(scores, s, b, row0, own0, key_begin, key_end);
      }
      hide_keys<P>(scores, s, own0);
      softmax.update(scores, s, o);
      P::multiply_down(o, s, own(values(stage)));
      sync_block();  // this stage is done with
      load(key0 + kStages * kKeys, stage);
      stage = (stage + 1) % kStages;
    }
    copy_async_wait<0>();
    sync_block();
    float* parts = reinterpret_cast<float*>(stages) + lane();
    if (warp() > 0) leave(o, softmax, parts + (warp() - 1) * kPartFloats);
    sync_block();
    if (warp() > 0) return;
    for (int n = 1; n < Shape::kWarps; ++n) merge(o, softmax, parts + (n - 1) * kPartFloats);
    Tile::finish_rows(o, softmax);
  }

  static TFORMER_DEVICE void leave(const R (&o)[kLaneRows][kO], const Softmax& softmax, float* part) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r, part += (kO + 2) * kWarp) {
      part[0] = softmax.m[r], part[kWarp] = softmax.l[r];
#pragma unroll
      for (int d = 0; d < kO; ++d) part[(d + 2) * kWarp] = o[r][d];
    }
  }

  TFORMER_DEVICE void merge(R (&o)[kLaneRows][kO], Softmax& softmax, const float* part) const {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r, part += (kO + 2) * kWarp) {
      const R other = part[0], m = maximum(softmax.m[r], other), held = m == -kInfinity<R> ? R(0) : m;
      const R by = Exponent<T>::power((softmax.m[r] - held) * scores.unit);
      const R other_by = Exponent<T>::power((other - held) * scores.unit);
      softmax.m[r] = m;
      softmax.l[r] = softmax.l[r] * by + part[kWarp] * other_by;
#pragma unroll
      for (int d = 0; d < kO; ++d) o[r][d] = o[r][d] * by + part[(d + 2) * kWarp] * other_by;
    }
  }
};

}  // namespace tformer::gpu
