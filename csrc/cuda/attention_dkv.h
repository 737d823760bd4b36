// dk and dv of a tile of keys: all queries of all heads that share it pass by.
#pragma once

#include "attention_backward.h"

namespace tformer::gpu {

enum class Wanted { both, keys, values };  // wide heads have not the registers for both

template <class T, int kWidth, Wanted kWanted>
struct AttentionKeyGradients {
  using R = Real<T>;
  using Shape = BackwardShape<T, kWidth>;
  static constexpr int kRows = Shape::rows(sizeof(T) == 2 ? 128 : 64);
  static constexpr int kLaneRows = kRows >= 64 ? 2 : kRowUnit<T> / 8;
  static constexpr int kWarpRows = 8 * kLaneRows, kThreads = kRows / kWarpRows * kWarp;
  static constexpr int kQueries = Shape::kOther, kStages = Shape::kStages;
  static constexpr bool kKeys = kWanted != Wanted::values, kValues = kWanted != Wanted::keys;
  using P = Products<T, kLaneRows>;
  using KeyTile = SharedTile<T, kRows, kWidth>;
  using QueryTile = SharedTile<T, kQueries, kWidth>;
  static constexpr int kWords = kRows > kKeepBlock ? kRows / kKeepBlock : 1;
  using Keep = KeepBits<kQueries, kWords>;
  static constexpr int kStageBytes = 2 * QueryTile::kBytes + 2 * kQueries * static_cast<int>(sizeof(R)) + Keep::kBytes;
  static constexpr size_t kSharedBytes = 2 * KeyTile::kBytes + kStages * kStageBytes;

  const AttentionCall& call;
  const AttentionParams& p;
  const Positions seq;
  const int b, kv_head, group;
  const int j0, row0;  // first key of the block, of the warp
  const KeptScale<R> kept;
  const KeyTile k, v;
  char* const stages;
  int query_begin, tiles;  // of each head

  static TFORMER_DEVICE void run(const AttentionCall& call, char* shared) {
    Work work = work_of(call.grid, block_index<0>());
    const AttentionParams& p = call.p;
    int64_t b = 0, h = work.head;
    if (call.packed) {
      if (!find_sequence(p.cu_seqlens_k, p.B, kRows, work.tile, b)) return;
    } else {
      b = work.head / p.Hk, h = work.head % p.Hk;
    }
    AttentionKeyGradients(call, static_cast<int>(b), static_cast<int>(h), static_cast<int>(work.tile) * kRows, shared)
        .attend();
  }

  TFORMER_DEVICE AttentionKeyGradients(const AttentionCall& call_, int b_, int h, int first, char* shared)
      : call(call_),
        p(call_.p),
        seq(sequence_of(p, b_)),
        b(b_),
        kv_head(h),
        group(static_cast<int>(p.Hq / p.Hk)),
        j0(first),
        row0(first + warp() * kWarpRows),
        kept(p),
        k{shared},
        v{shared + KeyTile::kBytes},
        stages(shared + 2 * KeyTile::kBytes) {
    const KeyRangeOf<int> range(p, sequence_of(p, b));
    const int j1 = smaller(j0 + kRows, seq.Sk);
    const int end = j0 < j1 ? range.query_end(j1 - 1, seq.Sq) : 0;
    query_begin = range.query_begin(j0) / kQueries * kQueries;
    tiles = end > query_begin ? (end - query_begin + kQueries - 1) / kQueries : 0;
  }

  // What passes by: q, do, lse as exponents, delta, what dropout keeps.
  struct Stage {
    QueryTile q, grad_o;
    R *lse, *delta;
    Keep keep;
  };
  TFORMER_DEVICE Stage stage(int step) const {
    char* data = stages + step % kStages * kStageBytes;
    R* lse = reinterpret_cast<R*>(data + 2 * QueryTile::kBytes);
    return {{data}, {data + QueryTile::kBytes}, lse, lse + kQueries, {reinterpret_cast<char*>(lse + 2 * kQueries)}};
  }
  TFORMER_DEVICE int head(int step) const { return kv_head * group + step / tiles; }
  TFORMER_DEVICE int first_query(int step) const { return query_begin + step % tiles * kQueries; }

  TFORMER_DEVICE void load(int step) const {
    const Stage to = stage(step);
    const int h = head(step), i0 = first_query(step), rows = seq.Sq - i0;
    const bool aligned = call.aligned;
    to.q.template load<kThreads>(row_at<const T>(p.q, b, h, seq.q_begin + i0), p.q.stride[2], rows,
                                 static_cast<int>(p.D), aligned);
    to.grad_o.template load<kThreads>(row_at<const T>(p.grad_o, b, h, seq.q_begin + i0), p.grad_o.stride[2], rows,
                                      static_cast<int>(p.Dv), aligned);
    copy_async_commit();
    const Scores<T, false> scores(p, sequence_of(p, b), b, h);
    const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + seq.q_begin + i0;
    for (int n = thread_index(); n < kQueries; n += kThreads) {
      to.lse[n] = n < rows ? scores.held_lse(static_cast<const R*>(p.lse)[at + n]) : kInfinity<R>;
      to.delta[n] = n < rows ? static_cast<R>(p.delta[at + n]) : R(0);
    }
    if (kept.dropout) to.keep.template draw<kThreads>(p, b, h, i0, j0 / kKeepBlock * kKeepBlock);
  }

  TFORMER_DEVICE void attend() const {
    R dk[kLaneRows][kWidth / 4], dv[kLaneRows][kWidth / 4], dbias[kLaneRows];
    clear(dk);
    clear(dv);
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) dbias[r] = 0;
    const bool aligned = call.aligned;
    k.template load<kThreads>(row_at<const T>(p.k, b, kv_head, seq.k_begin + j0), p.k.stride[2], seq.Sk - j0,
                              static_cast<int>(p.D), aligned);
    if (kKeys) {
      v.template load<kThreads>(row_at<const T>(p.v, b, kv_head, seq.k_begin + j0), p.v.stride[2], seq.Sk - j0,
                                static_cast<int>(p.Dv), aligned);
    }
    const int steps = group * tiles;
    if (kStages == 2 && steps > 0) load(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (kStages == 1) {
        sync_block();  // the last tile is done with
        load(step);
      }
      copy_async_wait<0>();
      sync_block();
      if (kStages == 2 && step + 1 < steps) load(step + 1);
      add_queries(step, dk, dv, dbias);
      if ((step + 1) % tiles == 0) add_grad_bias(head(step), dbias);
    }
    copy_async_wait<0>();
    sync_block();  // keys and values are there, also where no query came by
    finish(dk, dv);
  }

  TFORMER_DEVICE void add_queries(int step, R (&dk)[kLaneRows][kWidth / 4], R (&dv)[kLaneRows][kWidth / 4],
                                  R (&dbias)[kLaneRows]) const {
    const Stage from = stage(step);
    const int h = head(step), i0 = first_query(step);
    R s[kLaneRows][kQueries / 4], dp[kLaneRows][kQueries / 4];
    clear(s);
    clear(dp);
    P::multiply_rows(s, k, warp() * kWarpRows, from.q);
    if (kKeys) P::multiply_rows(dp, v, warp() * kWarpRows, from.grad_o);
    const Scores<T, false> scores(p, sequence_of(p, b), b, h);
    const auto kept_of = [&](int query, int j) { return this->kept_of(from, query, j); };
    const auto add = [&](int r, bool, int, int, R ds) { dbias[r] += ds; };
    differentiate_keys<P>(scores, row0, i0, from.lse, from.delta, s, dp, kept_of, add);
    if (kValues) P::multiply_down(dv, s, from.grad_o);
    if (kKeys) P::multiply_down(dk, dp, from.q);
  }

  TFORMER_DEVICE R kept_of(const Stage& from, int query, int j) const {
    if (!kept.dropout) return 1;
    const int at = j - j0 / kKeepBlock * kKeepBlock;
    return from.keep.word(query, at / 64) >> at % 64 & 1 ? kept.scale : R(0);
  }

  // A bias without a query dimension: its gradient is summed over the queries of a head.
  TFORMER_DEVICE void add_grad_bias(int h, R (&dbias)[kLaneRows]) const {
    if (!kKeys || !p.grad_bias || call.bias_has_rows) return;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const R sum = quad_sum(dbias[r]);
      const int j = row0 + P::row(r);
      dbias[r] = 0;
      if (j >= seq.Sk || lane() % 4 != 0) continue;
      static_cast<R*>(p.grad_bias)[b * p.grad_bias_stride[0] + h * p.grad_bias_stride[1] + j * p.grad_bias_stride[3]] =
          sum;
    }
  }

  TFORMER_DEVICE void finish(R (&dk)[kLaneRows][kWidth / 4], R (&dv)[kLaneRows][kWidth / 4]) const {
    const int length = call.packed ? seq.Sk : static_cast<int>(p.Sk);  // keys past key_lengths get zeros
    const int first = warp() * kWarpRows;
    unsigned suspects = 0;
    if (kKeys) {
      multiply_all(dk, static_cast<R>(p.scale));
      suspects |= suspect_rows<P>(dk);
      P::put(dk, k, first);
      k.store(first, kWarpRows, row_at<T>(p.grad_k, b, kv_head, seq.k_begin + row0), p.grad_k.stride[2], length - row0,
              static_cast<int>(p.D), call.aligned);
    }
    if (kValues) {
      suspects |= suspect_rows<P>(dv);
      P::put(dv, v, first);
      v.store(first, kWarpRows, row_at<T>(p.grad_v, b, kv_head, seq.k_begin + row0), p.grad_v.stride[2], length - row0,
              static_cast<int>(p.Dv), call.aligned);
    }
    for (int n = 0; n < kWarpRows; ++n) {
      if (suspects >> n & 1 && row0 + n < length) {
        redo_grad_key<T, false, kKeys, kValues>(p, seq, b, kv_head, group, row0 + n);
      }
    }
  }
};

}  // namespace tformer::gpu
