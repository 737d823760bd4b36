// o = softmax(scores) v: a block takes a tile of queries and goes through its keys (Dao 2023, FlashAttention-2).
#pragma once

#include "attention_forward_tile.h"

namespace tformer::gpu {

// Sizes of a block. A lane's registers hold o, kLaneRows x kWidth / 4, and the weights, kLaneRows x kKeys / 4; the
// general kernel of 16-bit elements leaves more of them to the operands. At most 99 KB of shared memory, so that any
// GPU from sm_80 has them; 128 KB and more for float64 above 128.
template <class T, int kWidth, bool kPlain>
struct ForwardShape {
  static constexpr bool k16Bit = sizeof(T) == 2;
  static constexpr int kPressure = kWidth * static_cast<int>(sizeof(Real<T>)) / 4;  // registers of o for four rows
  static constexpr int kLaneRows = k16Bit ? (kWidth <= (kPlain ? 128 : 64) ? 4 : 2)
                                          : (kPressure <= 64    ? 4
                                             : kPressure <= 128 ? 2
                                                                : kRowUnit<T> / 8);
  static constexpr int kKeys = k16Bit ? 64 : kPressure * kLaneRows <= 256 ? 32 : 16;
  static constexpr int kWarps = 4, kRowWarps = kWarps;  // kRowWarps: those with queries of their own
  static constexpr int kWarpRows = 8 * kLaneRows, kRows = kRowWarps * kWarpRows;
};

template <class T, int kWidth, bool kPlain>
struct AttentionForward : ForwardTile<T, kWidth, kPlain, ForwardShape<T, kWidth, kPlain>> {
  using Shape = ForwardShape<T, kWidth, kPlain>;
  using Tile = ForwardTile<T, kWidth, kPlain, Shape>;
  using Tile::all_begin, Tile::all_end, Tile::load_keys, Tile::load_queries, Tile::scores, Tile::seq;
  using Tile::b, Tile::call, Tile::h, Tile::i0, Tile::key_begin, Tile::key_end, Tile::p, Tile::q, Tile::row0;
  using Tile::kLaneRows, Tile::kKeys, Tile::kRows, Tile::kThreads;
  using typename Tile::KeyTile, typename Tile::P, typename Tile::QueryTile, typename Tile::R, typename Tile::Softmax;
  using Keep = KeepBits<kRows, 1>;
  static constexpr size_t kSharedBytes = QueryTile::kBytes + 2 * KeyTile::kBytes + (kPlain ? 0 : Keep::kBytes);

  const KeyTile k, v;
  const Keep keep;

  static TFORMER_DEVICE void run(const AttentionCall& call, char* shared) {
    run_forward_tile<AttentionForward>(call, shared);
  }

  TFORMER_DEVICE AttentionForward(const AttentionCall& call_, int b_, int h_, const Work& work, char* shared)
      : Tile(call_, b_, h_, work, shared),
        k{shared + QueryTile::kBytes},
        v{shared + QueryTile::kBytes + KeyTile::kBytes},
        keep{shared + QueryTile::kBytes + 2 * KeyTile::kBytes} {}

  // A warp without rows, most of a block's where a query or two is decoded, only loads what others multiply. The vote
  // tells the compiler that a warp goes one way: without it double of width 256 spills, with it 16-bit ones.
  TFORMER_DEVICE bool has_rows() const { return sizeof(T) == 2 ? row0 < seq.Sq : any(row0 < seq.Sq); }

  // Two buffers, one for keys, one for values: each is filled while the product with the other runs.
  TFORMER_DEVICE void attend() const {
    R o[kLaneRows][kWidth / 4];
    clear(o);
    Softmax softmax;
    load_queries();
    const int first_key0 = key_begin / kKeys * kKeys;
    int key0 = first_key0;
    if (key0 < key_end) load_keys(p.k, k, key0, p.D);
    copy_async_commit();
#pragma unroll 1
    for (; key0 < key_end; key0 += kKeys) {
      copy_async_wait<0>();
      sync_block();  // keys are there, the last values are done with
      load_keys(p.v, v, key0, p.Dv);
      copy_async_commit();
      if constexpr (!kPlain) {
        if (p.dropout_p > 0 && (key0 == first_key0 || key0 % kKeepBlock == 0)) {
          keep.template draw<kThreads>(p, b, h, i0, key0 / kKeepBlock * kKeepBlock);
        }
      }
      R s[kLaneRows][kKeys / 4];
      clear(s);
      if (has_rows()) P::multiply_rows(s, q, Tile::first_row(), k);
      copy_async_wait<0>();
      sync_block();  // values are there, the keys are done with
      if (key0 + kKeys < key_end) load_keys(p.k, k, key0 + kKeys, p.D);
      copy_async_commit();
      if (!has_rows()) continue;
      if (!kPlain || key0 < all_begin || key0 + kKeys > all_end) {
        finish_scores<P>(scores, s, b, row0, key0, key_begin, key_end);
      }
      if constexpr (kPlain) hide_keys<P>(scores, s, key0);
      softmax.update(scores, s, o);
      drop(s, key0);
      P::multiply_down(o, s, v);
    }
    copy_async_wait<0>();
    sync_block();  // without a key, other warps' copies of the queries are still on their way to where o goes
    Tile::finish_rows(o, softmax);
  }

  TFORMER_DEVICE void drop(R (&w)[kLaneRows][kKeys / 4], int key0) const {
    if constexpr (!kPlain) {
      if (p.dropout_p <= 0) return;
      const int first = key0 % kKeepBlock + P::first_column();
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const uint64_t bits = keep.word(Tile::first_row() + P::row(r), 0) >> first;
#pragma unroll
        for (int c = 0; c < kKeys / 4; ++c) w[r][c] = bits >> P::column_offset(c) & 1 ? w[r][c] : R(0);
      }
    }
  }
};

}  // namespace tformer::gpu
