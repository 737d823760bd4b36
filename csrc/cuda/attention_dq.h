// dq of a tile of queries: all keys pass by. And the gradient of a bias that has a query dimension.
#pragma once

#include "attention_backward.h"

namespace tformer::gpu {

template <class T, int kWidth>
struct AttentionQueryGradients {
  using R = Real<T>;
  using Shape = BackwardShape<T, kWidth>;
  static constexpr int kRows = Shape::rows(sizeof(T) == 2 ? 64 : 128);
  static constexpr int kWarps = kRows >= 4 * kRowUnit<T> ? 4 : 2;
  static constexpr int kWarpRows = kRows / kWarps, kLaneRows = kWarpRows / 8, kThreads = kWarps * kWarp;
  static constexpr int kKeys = Shape::kOther, kStages = Shape::kStages;
  using P = Products<T, kLaneRows>;
  using QueryTile = SharedTile<T, kRows, kWidth>;
  using KeyTile = SharedTile<T, kKeys, kWidth>;
  using Keep = KeepBits<kRows, 1>;
  static constexpr int kStageBytes = 2 * KeyTile::kBytes, kKeptBytes = 2 * Keep::kBytes;
  static constexpr size_t kSharedBytes = 2 * QueryTile::kBytes + kStages * kStageBytes + kKeptBytes;

  const AttentionCall& call;
  const AttentionParams& p;
  const Positions seq;
  const int b, h, kv_head, part;
  const int i0, row0;  // first query of the block, of the warp
  const KeptScale<R> kept;
  const Scores<T, false> scores;
  const QueryTile q, grad_o;
  char* const stages;
  int key_begin, key_end;

  static TFORMER_DEVICE void run(const AttentionCall& call, char* shared) {
    Work work = work_of(call.grid, block_index<0>());
    const AttentionParams& p = call.p;
    const int64_t heads = p.Hq / call.shared_heads;
    int64_t b = work.head / heads, h = work.head % heads;
    if (call.packed && !find_sequence(p.cu_seqlens_q, p.B, kRows, work.tile, b)) return;
    // Batches and heads that share an entry of the bias's gradient add to it one after the other.
    const int64_t end = (work.split + 1) * call.pairs, shared_by = call.shared_batches * call.shared_heads;
#pragma unroll 1
    for (int64_t pair = work.split * call.pairs; pair < end && pair < shared_by; ++pair) {
      const auto shared_b = static_cast<int>(b + pair / call.shared_heads);
      const auto shared_h = static_cast<int>(h + pair % call.shared_heads);
      AttentionQueryGradients(call, shared_b, shared_h, work, shared).attend();
      sync_block();  // the tiles are done with
    }
  }

  TFORMER_DEVICE AttentionQueryGradients(const AttentionCall& call_, int b_, int h_, const Work& work, char* shared)
      : call(call_),
        p(call_.p),
        seq(sequence_of(p, b_)),
        b(b_),
        h(h_),
        kv_head(static_cast<int>(h_ / (p.Hq / p.Hk))),
        part(static_cast<int>(work.split)),
        i0(static_cast<int>(work.tile) * kRows),
        row0(i0 + warp() * kWarpRows),
        kept(p),
        scores(p, sequence_of(p, b_), b_, h_),
        q{shared},
        grad_o{shared + QueryTile::kBytes},
        stages(shared + 2 * QueryTile::kBytes) {
    key_begin = scores.range.begin(i0) / kKeys * kKeys;
    key_end = scores.range.end(smaller(i0 + kRows, seq.Sq) - 1);
  }

  struct Stage {
    KeyTile k, v;
  };
  TFORMER_DEVICE Stage stage(int key0) const {
    char* data = stages + key0 / kKeys % kStages * kStageBytes;
    return {{data}, {data + KeyTile::kBytes}};
  }
  // What dropout keeps is drawn for blocks of keys that may hold several tiles.
  TFORMER_DEVICE Keep keep(int key0) const {
    return {stages + kStages * kStageBytes + key0 / kKeepBlock % 2 * Keep::kBytes};
  }

  TFORMER_DEVICE void load(int key0) const {
    const Stage to = stage(key0);
    const bool aligned = call.aligned;
    to.k.template load<kThreads>(row_at<const T>(p.k, b, kv_head, seq.k_begin + key0), p.k.stride[2], seq.Sk - key0,
                                 static_cast<int>(p.D), aligned);
    to.v.template load<kThreads>(row_at<const T>(p.v, b, kv_head, seq.k_begin + key0), p.v.stride[2], seq.Sk - key0,
                                 static_cast<int>(p.Dv), aligned);
    copy_async_commit();
    if (kept.dropout && (key0 == key_begin || key0 % kKeepBlock == 0)) {
      keep(key0).template draw<kThreads>(p, b, h, i0, key0 / kKeepBlock * kKeepBlock);
    }
  }

  TFORMER_DEVICE void attend() const {
    R dq[kLaneRows][kWidth / 4], lse[kLaneRows], delta[kLaneRows], dbias[kLaneRows];
    clear(dq);
    const bool aligned = call.aligned;
    q.template load<kThreads>(row_at<const T>(p.q, b, h, seq.q_begin + i0), p.q.stride[2], seq.Sq - i0,
                              static_cast<int>(p.D), aligned);
    grad_o.template load<kThreads>(row_at<const T>(p.grad_o, b, h, seq.q_begin + i0), p.grad_o.stride[2], seq.Sq - i0,
                                   static_cast<int>(p.Dv), aligned);
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int i = row0 + P::row(r);
      const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + seq.q_begin + i;
      lse[r] = i < seq.Sq ? scores.held_lse(static_cast<const R*>(p.lse)[at]) : kInfinity<R>;
      delta[r] = i < seq.Sq ? static_cast<R>(p.delta[at]) : R(0);
      dbias[r] = 0;
    }
    if (kStages == 2 && key_begin < key_end) load(key_begin);
#pragma unroll 1
    for (int key0 = key_begin; key0 < key_end; key0 += kKeys) {
      if (kStages == 1) {
        sync_block();  // the last tile is done with
        load(key0);
      }
      copy_async_wait<0>();
      sync_block();
      if (kStages == 2 && key0 + kKeys < key_end) load(key0 + kKeys);
      add_keys(key0, lse, delta, dq, dbias);
    }
    copy_async_wait<0>();
    sync_block();
    finish(dq, dbias);
  }

  TFORMER_DEVICE void add_keys(int key0, const R (&lse)[kLaneRows], const R (&delta)[kLaneRows],
                               R (&dq)[kLaneRows][kWidth / 4], R (&dbias)[kLaneRows]) const {
    const Stage from = stage(key0);
    R s[kLaneRows][kKeys / 4], dp[kLaneRows][kKeys / 4];
    clear(s);
    clear(dp);
    P::multiply_rows(s, q, warp() * kWarpRows, from.k);
    P::multiply_rows(dp, grad_o, warp() * kWarpRows, from.v);
    const bool all_visible = scores.all_visible(row0, row0 + kWarpRows, key0, key0 + kKeys);
    scores.for_operands(
        [&](auto by_tile) { differentiate<decltype(by_tile)::value>(key0, all_visible, lse, delta, s, dp, dbias); });
    P::multiply_down(dq, dp, from.k);
  }

  // dp becomes ds; the gradient of the bias is added up. kByTile: as Scores::for_operands says.
  template <bool kByTile>
  TFORMER_DEVICE void differentiate(int key0, bool all_visible, const R (&lse)[kLaneRows], const R (&delta)[kLaneRows],
                                    R (&s)[kLaneRows][kKeys / 4], R (&dp)[kLaneRows][kKeys / 4],
                                    R (&dbias)[kLaneRows]) const {
    const int lane_key0 = key0 + P::first_column();
    if constexpr (kByTile) {
      scores.add_operands(s, [&](int r, int c) { return Pair{row0 + P::row(r), lane_key0 + P::column_offset(c)}; });
    }
    const auto range = scores.range.from_key(lane_key0);
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int i = row0 + P::row(r);
      int begin = 0, end = kKeys;
      if (!all_visible) {
        begin = range.begin(i);
        end = i < seq.Sq ? range.end(i) : 0;
      }
      uint64_t bits = 0;
      if (kept.dropout) {
        bits = keep(key0).word(warp() * kWarpRows + P::row(r), 0) >> (key0 % kKeepBlock + P::first_column());
      }
#pragma unroll
      for (int c = 0; c < kKeys / 4; ++c) {
        const int j = P::column_offset(c);
        const R factor = !kept.dropout ? R(1) : bits >> j & 1 ? kept.scale : R(0);
        const bool visible = j >= begin && j < end;
        R x = s[r][c], cap = 1;
        if constexpr (!kByTile) {
          const Pair of = scores.nearest({i, lane_key0 + j});
          x = scores.score(x, of.i, of.j, cap);
        }
        const auto g = gpu::differentiate(scores, x, cap, dp[r][c], lse[r], delta[r], factor, visible);
        dp[r][c] = g.ds;
        if (visible) add_grad_bias(i, lane_key0 + j, g.dbias, dbias[r]);
      }
    }
  }

  TFORMER_DEVICE bool wants_bias() const { return p.grad_bias && call.bias_has_rows; }
  TFORMER_DEVICE R& grad_bias_at(int i, int j) const {
    const int64_t* stride = p.grad_bias_stride;
    return static_cast<R*>(
        p.grad_bias)[part * call.part_stride + b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]];
  }

  // A pair has the same lane for every batch and head, so what they share needs no atomics. A bias without a key
  // dimension is summed over keys first.
  TFORMER_DEVICE void add_grad_bias(int i, int j, R ds, R& sum) const {
    if (!wants_bias()) return;
    if (p.grad_bias_stride[3] == 0) {
      sum += ds;
    } else {
      grad_bias_at(i, j) += ds;
    }
  }

  TFORMER_DEVICE void finish(R (&dq)[kLaneRows][kWidth / 4], const R (&dbias)[kLaneRows]) const {
    const int first = warp() * kWarpRows;
    if (wants_bias() && p.grad_bias_stride[3] == 0) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const R sum = quad_sum(dbias[r]);
        const int i = row0 + P::row(r);
        if (i < seq.Sq && lane() % 4 == 0) grad_bias_at(i, 0) += sum;
      }
    }
    multiply_all(dq, scores.scale);
    const unsigned suspects = suspect_rows<P>(dq);
    P::put(dq, q, first);
    q.store(first, kWarpRows, row_at<T>(p.grad_q, b, h, seq.q_begin + row0), p.grad_q.stride[2], seq.Sq - row0,
            static_cast<int>(p.D), call.aligned);
    for (int n = 0; n < kWarpRows; ++n) {
      if (suspects >> n & 1 && row0 + n < seq.Sq) redo_grad_query(p, scores, seq, b, h, kv_head, row0 + n);
    }
  }
};

}  // namespace tformer::gpu
