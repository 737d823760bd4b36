// o = softmax(scores) v: a block takes a tile of queries and goes through its keys (Dao 2023, FlashAttention-2).
#pragma once

#include "attention_dropout.h"
#include "attention_launch.h"
#include "attention_rows.h"
#include "attention_scores.h"
#include "attention_work.h"

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
  static constexpr int kWarps = 4;
  static constexpr int kWarpRows = 8 * kLaneRows, kRows = kWarps * kWarpRows;
};

template <class T, int kWidth, bool kPlain>
struct AttentionForward {
  using R = Real<T>;
  using Shape = ForwardShape<T, kWidth, kPlain>;
  static constexpr int kLaneRows = Shape::kLaneRows, kKeys = Shape::kKeys, kRows = Shape::kRows;
  static constexpr int kThreads = Shape::kWarps * kWarp;
  using P = Products<T, kLaneRows>;
  using QueryTile = SharedTile<T, kRows, kWidth>;
  using KeyTile = SharedTile<T, kKeys, kWidth>;
  using Keep = KeepBits<kRows, 1>;
  static constexpr size_t kSharedBytes = QueryTile::kBytes + 2 * KeyTile::kBytes + (kPlain ? 0 : Keep::kBytes);

  const AttentionCall& call;
  const AttentionParams& p;
  const Positions seq;
  const int b, h, kv_head, split;
  const int i0, row0;      // first query of the block, of the warp
  int key_begin, key_end;  // what some query of the block sees
  int all_begin, all_end;  // what every query of the warp sees; rows past the last one, zeros, may see anything
  const Scores<T, kPlain> scores;
  const QueryTile q;
  const KeyTile k, v;
  const Keep keep;

  static TFORMER_DEVICE void run(const AttentionCall& call, char* shared) {
    Work work = work_of(call.grid, block_index<0>());
    const AttentionParams& p = call.p;
    int64_t b = 0, h = work.head;
    if (call.packed) {
      if (!find_sequence(p.cu_seqlens_q, p.B, kRows, work.tile, b)) return;
    } else {
      b = work.head / p.Hq, h = work.head % p.Hq;
    }
    AttentionForward(call, static_cast<int>(b), static_cast<int>(h), work, shared).attend();
  }

  TFORMER_DEVICE AttentionForward(const AttentionCall& call_, int b_, int h_, const Work& work, char* shared)
      : call(call_),
        p(call_.p),
        seq(sequence_of(p, b_)),
        b(b_),
        h(h_),
        kv_head(static_cast<int>(h_ / (p.Hq / p.Hk))),
        split(static_cast<int>(work.split)),
        i0(static_cast<int>(work.tile) * kRows),
        row0(i0 + warp() * Shape::kWarpRows),
        scores(p, sequence_of(p, b_), b_, h_),
        q{shared},
        k{shared + QueryTile::kBytes},
        v{shared + QueryTile::kBytes + KeyTile::kBytes},
        keep{shared + QueryTile::kBytes + 2 * KeyTile::kBytes} {
    key_begin = scores.range.begin(i0);
    key_end = scores.range.end(smaller(i0 + kRows, seq.Sq) - 1);
    if (call.split_o) {
      key_begin = larger(key_begin, split * static_cast<int>(call.split_keys));
      key_end = smaller(key_end, (split + 1) * static_cast<int>(call.split_keys));
    }
    all_begin = larger(key_begin, scores.range.begin(row0 + Shape::kWarpRows - 1));
    all_end = smaller(key_end, scores.range.end(row0));
  }

  TFORMER_DEVICE void load_keys(const Rows& rows, const KeyTile& tile, int key0, int64_t width) const {
    tile.template load<kThreads>(row_at<const T>(rows, b, kv_head, seq.k_begin + key0), rows.stride[2], seq.Sk - key0,
                                 static_cast<int>(width), kPlain || call.aligned);
  }

  // A warp without rows, most of a block's where a query or two is decoded, only loads what others multiply. The vote
  // tells the compiler that a warp goes one way: without it float and double of width 256 spill, with it 16-bit ones.
  TFORMER_DEVICE bool has_rows() const { return sizeof(T) == 2 ? row0 < seq.Sq : any(row0 < seq.Sq); }

  // Two buffers, one for keys, one for values: each is filled while the product with the other runs.
  TFORMER_DEVICE void attend() const {
    R o[kLaneRows][kWidth / 4];
    clear(o);
    OnlineSoftmax<T, kLaneRows, kPlain> softmax;
    q.template load<kThreads>(row_at<const T>(p.q, b, h, seq.q_begin + i0), p.q.stride[2], seq.Sq - i0,
                              static_cast<int>(p.D), kPlain || call.aligned);
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
      if (has_rows()) P::multiply_rows(s, q, warp() * Shape::kWarpRows, k);
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
    finish_rows(o, softmax);
  }

  TFORMER_DEVICE void drop(R (&w)[kLaneRows][kKeys / 4], int key0) const {
    if constexpr (!kPlain) {
      if (p.dropout_p <= 0) return;
      const int first = key0 % kKeepBlock + P::first_column();
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const uint64_t bits = keep.word(warp() * Shape::kWarpRows + P::row(r), 0) >> first;
#pragma unroll
        for (int c = 0; c < kKeys / 4; ++c) w[r][c] = bits >> P::column_offset(c) & 1 ? w[r][c] : R(0);
      }
    }
  }

  // o / l and the log-sum-exp; a row without a visible key is 0 and -inf.
  TFORMER_DEVICE void finish_rows(R (&o)[kLaneRows][kWidth / 4], OnlineSoftmax<T, kLaneRows, kPlain>& softmax) const {
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
      P::put(o, q, warp() * Shape::kWarpRows);  // its own queries, which no other warp reads
      q.store(warp() * Shape::kWarpRows, Shape::kWarpRows, row_at<T>(p.o, b, h, seq.q_begin + row0), p.o.stride[2],
              seq.Sq - row0, static_cast<int>(p.Dv), kPlain || call.aligned);
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

}  // namespace tformer::gpu
