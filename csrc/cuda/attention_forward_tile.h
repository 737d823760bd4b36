// What forward kernels have in common: a block's tile of queries, which keys these see, and where results go.
#pragma once

#include "attention_dropout.h"
#include "attention_launch.h"
#include "attention_rows.h"
#include "attention_scores.h"
#include "attention_work.h"

namespace tformer::gpu {

// Shape: kLaneRows, kKeys of a tile, kWarps; kRowWarps, those that have queries of their own, kWarpRows each, kRows in
// all.
template <class T, int kWidth, bool kPlain, class Shape>
struct ForwardTile {
  using R = Real<T>;
  static constexpr int kLaneRows = Shape::kLaneRows, kKeys = Shape::kKeys, kRows = Shape::kRows;
  static constexpr int kThreads = Shape::kWarps * kWarp;
  using P = Products<T, kLaneRows>;
  using QueryTile = SharedTile<T, kRows, kWidth>;
  using KeyTile = SharedTile<T, kKeys, kWidth>;
  using Softmax = OnlineSoftmax<T, kLaneRows, kPlain>;

  const AttentionCall& call;
  const AttentionParams& p;
  const Positions seq;
  const int b, h, kv_head, split;
  const int i0, row0;      // first query of the block, of the warp
  int key_begin, key_end;  // what some query of the block sees
  int all_begin, all_end;  // what every query of the warp sees; rows past the last one, zeros, may see anything
  const Scores<T, kPlain> scores;
  const QueryTile q;

  TFORMER_DEVICE ForwardTile(const AttentionCall& call_, int b_, int h_, const Work& work, char* shared)
      : call(call_),
        p(call_.p),
        seq(sequence_of(p, b_)),
        b(b_),
        h(h_),
        kv_head(static_cast<int>(h_ / (p.Hq / p.Hk))),
        split(static_cast<int>(work.split)),
        i0(static_cast<int>(work.tile) * kRows),
        row0(i0 + first_row()),
        scores(p, sequence_of(p, b_), b_, h_),
        q{shared} {
    key_begin = scores.range.begin(i0);
    key_end = scores.range.end(smaller(i0 + kRows, seq.Sq) - 1);
    if (call.split_o) {
      key_begin = larger(key_begin, split * static_cast<int>(call.split_keys));
      key_end = smaller(key_end, (split + 1) * static_cast<int>(call.split_keys));
    }
    all_begin = larger(key_begin, scores.range.begin(row0 + Shape::kWarpRows - 1));
    all_end = smaller(key_end, scores.range.end(row0));
  }

  // The warp's, of the tile.
  static TFORMER_DEVICE int first_row() { return Shape::kRowWarps == 1 ? 0 : warp() * Shape::kWarpRows; }

  TFORMER_DEVICE void load_queries() const {
    q.template load<kThreads>(row_at<const T>(p.q, b, h, seq.q_begin + i0), p.q.stride[2], seq.Sq - i0,
                              static_cast<int>(p.D), kPlain || call.aligned);
  }
  TFORMER_DEVICE void load_keys(const Rows& rows, const KeyTile& tile, int key0, int64_t width) const {
    tile.template load<kThreads>(row_at<const T>(rows, b, kv_head, seq.k_begin + key0), rows.stride[2], seq.Sk - key0,
                                 static_cast<int>(width), kPlain || call.aligned);
  }

  // o / l and the log-sum-exp; a row without a visible key is 0 and -inf.
  TFORMER_DEVICE void finish_rows(R (&o)[kLaneRows][kWidth / 4], Softmax& softmax) const {
    const R kept = !kPlain && p.dropout_p > 0 ? static_cast<R>(dropout_scale(p.dropout_p)) : R(1);
    const bool has_sink = p.sinks && !call.split_o;
    const unsigned suspects = softmax.template finish_rows<P>(
        scores, o, row0, has_sink, has_sink ? sink_of<R>(p, h) : R(0), kept, [&](int i) -> R& { return lse_at(i); });
    store(o);
    for (int n = 0; n < Shape::kWarpRows; ++n) {
      if (suspects >> n & 1) redo_row(row0 + n);
    }
  }

  TFORMER_DEVICE R& lse_at(int i) const {
    if (call.split_o) {
      return static_cast<R*>(call.split_lse)[split * call.split_stride[0] + b * call.split_stride[1] +
                                             h * call.split_stride[2] + seq.q_begin + i];
    }
    return static_cast<R*>(p.lse)[b * p.lse_stride[0] + h * p.lse_stride[1] + seq.q_begin + i];
  }

  TFORMER_DEVICE R* split_row(int i) const {
    return static_cast<R*>(call.split_o) +
           (split * call.split_stride[0] + b * call.split_stride[1] + h * call.split_stride[2] + seq.q_begin + i) *
               p.Dv;
  }

  TFORMER_DEVICE void store(const R (&o)[kLaneRows][kWidth / 4]) const {
    if (!call.split_o) {
      P::put(o, q, first_row());  // its own queries, which no other warp reads
      q.store(first_row(), Shape::kWarpRows, row_at<T>(p.o, b, h, seq.q_begin + row0), p.o.stride[2], seq.Sq - row0,
              static_cast<int>(p.Dv), kPlain || call.aligned);
      return;
    }
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int i = row0 + P::row(r);
      if (i >= seq.Sq) continue;
#pragma unroll
      for (int d = 0; d < kWidth / 4; ++d) {
        if (P::column(d) < p.Dv) split_row(i)[P::column(d)] = o[r][d];
      }
    }
    sync_warp();
  }

  // 0 times NaN or infinity is NaN, so a hidden value that is not finite has spoilt the products of a row: it is
  // computed again without the hidden ones. Where the formula gives NaN or infinity, so does this.
  TFORMER_DEVICE void redo_row(int i) const {
    RowForward<T, kPlain> row(scores, seq, b, h, i);
    const int begin = larger(scores.range.begin(i), key_begin), end = smaller(scores.range.end(i), key_end);
    for (int j = begin; j < end; ++j) row.add_key(j);
    if (p.sinks && !call.split_o) row.add_weight(sink_of<R>(p, h));
    if (call.split_o) {
      row.store(split_row(i));
    } else {
      row.store(row_at<T>(p.o, b, h, seq.q_begin + i));
    }
  }
};

// The tile's block, by the call's grid.
template <class Kernel>
TFORMER_DEVICE void run_forward_tile(const AttentionCall& call, char* shared) {
  Work work = work_of(call.grid, block_index<0>());
  const AttentionParams& p = call.p;
  int64_t b = 0, h = work.head;
  if (call.packed) {
    if (!find_sequence(p.cu_seqlens_q, p.B, Kernel::kRows, work.tile, b)) return;
  } else {
    b = work.head / p.Hq, h = work.head % p.Hq;
  }
  Kernel(call, static_cast<int>(b), static_cast<int>(h), work, shared).attend();
}

}  // namespace tformer::gpu
