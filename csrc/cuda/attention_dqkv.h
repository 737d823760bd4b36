// dq, dk and dv in one pass of five products, by mma.sync, for 16-bit elements. A block has a tile of keys and values
// and goes through the queries of all heads that share it. Scores are transposed, keys by queries; weights and their
// gradients lie in shared memory, from where each warp takes 32 rows for dv, dk and dq: a warp of 16 rows with its
// operands in registers reads twice as much of the other side.
//
// dq of a tile of queries is summed over tiles of keys in global memory, in float and in the order of the keys: each
// block waits for its turn. Whom it waits for has an earlier tile of keys of the same head, and blocks take their work
// by a ticket, earlier tiles first: so that block has begun, and of all blocks that have not ended the one with the
// first ticket waits for nobody. Queries come from the last to the first, which is the one order in which blocks that
// begin together arrive one after the other, causal or not. attention_dq_sums.h makes dq of the sums.
#pragma once

#include "attention_backward.h"
#include "attention_dq_sums.h"

namespace tformer::gpu {

template <class T, int kWidth, int kKeys_, bool kPlain>
struct AttentionGradients {
  static constexpr int kKeys = kKeys_, kQueries = kOnePassQueries;
  static constexpr int kWarpRows = 32, kLaneRows = kWarpRows / 8;  // of each product of a warp
  // So many warps share keys: of scores each has a part of the queries, of dk and dv one of the columns.
  static constexpr int kSharing = kWidth <= 128 ? 2 : 4, kWarpQueries = kQueries / kSharing;
  static constexpr int kWarps = kKeys / kWarpRows * kSharing, kThreads = kWarps * kWarp;
  static constexpr int kStages = kWidth <= 128 ? 2 : 1;  // of queries
  using P = TensorCores<T, kLaneRows>;
  using Sums = OnePassSums<kWidth>;
  using KeyTile = SharedTile<T, kKeys, kWidth>;
  using QueryTile = SharedTile<T, kQueries, kWidth>;
  using WarpQueryTile = SharedTile<T, kWarpQueries, kWidth>;
  using ScoreTile = SharedTile<T, kKeys, kQueries>;
  using Keep = KeepBits<kQueries, kKeys / kKeepBlock>;
  static constexpr int kRowBytes = 2 * kQueries * 4;  // lse, as weights take it, and delta
  static constexpr int kStageBytes = QueryTile::kBytes + kRowBytes + (kPlain ? 0 : Keep::kBytes);
  static constexpr size_t kSharedBytes = 2 * KeyTile::kBytes + QueryTile::kBytes + 2 * ScoreTile::kBytes +
                                         kStages * kStageBytes + kWarps * sizeof(unsigned);

  const OnePassCall& given;
  const AttentionCall& call;
  const AttentionParams& p;
  const Positions seq;
  const int b, kv_head, group, tile;
  const int j0, row0;  // first key of the block, of the warp
  const KeptScale<float> kept;
  const KeyTile k, v;
  const QueryTile grad_o;
  const ScoreTile weights, grads;  // p and ds
  char* const stages;
  unsigned* const suspects;  // rows of each warp that are to be computed anew
  int first_tile, tiles;     // of queries, of each head

  static TFORMER_DEVICE void run(const OnePassCall& given, char* shared) {
    const AttentionCall& call = given.call;
    const AttentionParams& p = call.p;
    auto* ticket = reinterpret_cast<int32_t*>(shared);
    if (thread_index() == 0) *ticket = take_ticket(given.ticket);
    sync_block();
    Work work = work_of(call.grid, *ticket);
    sync_block();  // it is read
    int64_t b = 0, h = work.head;
    if (call.packed) {
      if (!find_sequence(p.cu_seqlens_k, p.B, kKeys, work.tile, b)) return;
    } else {
      b = work.head / p.Hk, h = work.head % p.Hk;
    }
    AttentionGradients(given, static_cast<int>(b), static_cast<int>(h), static_cast<int>(work.tile), shared).attend();
  }

  TFORMER_DEVICE AttentionGradients(const OnePassCall& given_, int b_, int h, int tile_, char* shared)
      : given(given_),
        call(given_.call),
        p(given_.call.p),
        seq(sequence_of(p, b_)),
        b(b_),
        kv_head(h),
        group(static_cast<int>(p.Hq / p.Hk)),
        tile(tile_),
        j0(tile_ * kKeys),
        row0(j0 + first_key()),
        kept(p),
        k{shared},
        v{shared + KeyTile::kBytes},
        grad_o{shared + 2 * KeyTile::kBytes},
        weights{grad_o.data + QueryTile::kBytes},
        grads{weights.data + ScoreTile::kBytes},
        stages(grads.data + ScoreTile::kBytes),
        suspects(reinterpret_cast<unsigned*>(stages + kStages * kStageBytes)) {
    const KeyRangeOf<int> range(p, sequence_of(p, b));
    const int j1 = smaller(j0 + kKeys, seq.Sk), begin = range.query_begin(j0);
    const int end = j0 < j1 ? range.query_end(j1 - 1, seq.Sq) : 0;
    first_tile = begin / kQueries;
    tiles = end > begin ? (end + kQueries - 1) / kQueries - first_tile : 0;
  }

  // A warp's part begins here: keys and queries of scores; the same keys and columns of dk and dv, in chunks; half of
  // the queries and columns of dq.
  static TFORMER_DEVICE int first_key() { return warp() / kSharing * kWarpRows; }
  static TFORMER_DEVICE int first_query() { return warp() % kSharing * kWarpQueries; }
  static TFORMER_DEVICE int first_chunk() { return warp() % kSharing * (kWidth / kSharing / Chunk<T>::kSize); }
  static TFORMER_DEVICE int first_sum_row() { return warp() % 2 * kWarpRows; }
  static TFORMER_DEVICE int first_sum_chunk() { return warp() / 2 * (kSumColumns / Chunk<T>::kSize); }
  static constexpr int kLaneColumns = kWidth / kSharing / 4, kSumColumns = kWidth / (kWarps / 2);

  // A tile of queries. All heads in turn have the same one: so a block that has fewer of them than another does not
  // wait for it.
  struct Step {
    int n, h, i0;
    TFORMER_DEVICE Step next(int first_head, int end_head) const {
      return h + 1 < end_head ? Step{n + 1, h + 1, i0} : Step{n + 1, first_head, i0 - kQueries};
    }
  };

  // What passes by; do has one place.
  struct Stage {
    QueryTile q;
    float *lse, *delta;
    Keep keep;
  };
  TFORMER_DEVICE Stage stage(const Step& step) const {
    char* data = stages + step.n % kStages * kStageBytes;
    float* lse = reinterpret_cast<float*>(data + QueryTile::kBytes);
    return {{data}, lse, lse + kQueries, {reinterpret_cast<char*>(lse + 2 * kQueries)}};
  }
  // A thread's query: read while products run, put where warps look for it before they meet.
  struct QueryRow {
    float lse, delta;
  };
  TFORMER_DEVICE void put_row(const Step& step, const QueryRow& row) const {
    const Stage to = stage(step);
    if (thread_index() < kQueries) to.lse[thread_index()] = row.lse, to.delta[thread_index()] = row.delta;
  }

  TFORMER_DEVICE QueryRow load_queries(const Step& step) const {
    const Stage to = stage(step);
    const int h = step.h, i0 = step.i0, rows = seq.Sq - i0, n = thread_index();
    to.q.template load<kThreads>(row_at<const T>(p.q, b, h, seq.q_begin + i0), p.q.stride[2], rows,
                                 static_cast<int>(p.D), kPlain || call.aligned);
    copy_async_commit();
    QueryRow row{kInfinity<float>, 0};
    if (n < kQueries && n < rows) {
      const Scores<T, kPlain> scores(p, sequence_of(p, b), b, h);
      const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + seq.q_begin + i0 + n;
      row = {scores.held_lse(static_cast<const float*>(p.lse)[at]), static_cast<float>(p.delta[at])};
    }
    if constexpr (!kPlain) {
      if (kept.dropout) to.keep.template draw<kThreads>(p, b, h, i0, j0);
    }
    return row;
  }
  TFORMER_DEVICE void load_grad_o(const Step& step) const {
    grad_o.template load<kThreads>(row_at<const T>(p.grad_o, b, step.h, seq.q_begin + step.i0), p.grad_o.stride[2],
                                   seq.Sq - step.i0, static_cast<int>(p.Dv), kPlain || call.aligned);
    copy_async_commit();
  }

  TFORMER_DEVICE void attend() const {
    float dk[kLaneRows][kLaneColumns], dv[kLaneRows][kLaneColumns];
    clear(dk);
    clear(dv);
    const int first_head = kv_head * group, steps = group * tiles;
    Step step{0, first_head, (first_tile + tiles - 1) * kQueries};
    if (steps > 0) {
      const bool aligned = kPlain || call.aligned;
      k.template load<kThreads>(row_at<const T>(p.k, b, kv_head, seq.k_begin + j0), p.k.stride[2], seq.Sk - j0,
                                static_cast<int>(p.D), aligned);
      v.template load<kThreads>(row_at<const T>(p.v, b, kv_head, seq.k_begin + j0), p.v.stride[2], seq.Sk - j0,
                                static_cast<int>(p.Dv), aligned);
      load_grad_o(step);
      put_row(step, load_queries(step));
    }
    int32_t* turn = nullptr;  // of the step before
#pragma unroll 1
    while (step.n < steps) {
      copy_async_wait<0>();
      sync_block();  // queries and do are there, what the last step read and added is done with
      if (turn && thread_index() == 0) give_turn(turn, tile + 1);
      const Step next = step.next(first_head, first_head + group);
      const bool more = next.n < steps;
      QueryRow next_row{};
      if (kStages == 2 && more) next_row = load_queries(next);
      differentiate(step);
      sync_block();  // weights and their gradients are there
      P::template multiply_tiles<false>(dv, weights, first_key(), grad_o, first_chunk());
      P::template multiply_tiles<false>(dk, grads, first_key(), stage(step).q, first_chunk());
      const int slot = query_tile_of(call, kQueries, seq.q_begin, b, step.h, step.i0);
      const bool first = KeyRangeOf<int>(p, sequence_of(p, b)).begin(step.i0) / kKeys == tile;
      turn = given.turns + slot;
      if (!first && thread_index() == 0) wait_for_turn_of(turn, tile);
      sync_block();  // queries and do are done with; the block has its turn
      if (more) load_grad_o(next);
      if (kStages == 1 && more) next_row = load_queries(next);
      float dq[kLaneRows][kSumColumns / 4];
      clear(dq);
      P::template multiply_tiles<true>(dq, grads, first_sum_row(), k, first_sum_chunk());
      Sums::add(given.sums + int64_t{slot} * Sums::kFloats, first_sum_row(), first_sum_chunk(), dq, first);
      if (more) put_row(next, next_row);
      step = next;
    }
    sync_block();  // all have added
    if (turn && thread_index() == 0) give_turn(turn, tile + 1);
    finish(dk, dv);
  }

  TFORMER_DEVICE void differentiate(const Step& step) const {
    const Stage from = stage(step);
    const int h = step.h, i0 = step.i0 + first_query(), offset = first_query() * KeyTile::kWidth * 2;
    float s[kLaneRows][kWarpQueries / 4], dp[kLaneRows][kWarpQueries / 4];
    clear(s);
    clear(dp);
    P::multiply_rows(s, k, first_key(), WarpQueryTile{from.q.data + offset});
    P::multiply_rows(dp, v, first_key(), WarpQueryTile{grad_o.data + offset});
    const Scores<T, kPlain> scores(p, sequence_of(p, b), b, h);
    const float *lse = from.lse + first_query(), *delta = from.delta + first_query();
    if constexpr (kPlain) {
      differentiate_keys<P>(scores, seq.Sk, row0, i0, lse, delta, s, dp);
    } else {
      const auto kept_of = [&](int n, int j) {
        if (!kept.dropout) return 1.0f;
        return from.keep.word(first_query() + n, (j - j0) / kKeepBlock) >> j % kKeepBlock & 1 ? kept.scale : 0.0f;
      };
      const auto store_grad_bias = [&](int, bool visible, int i, int j, float ds) {
        if (!p.grad_bias || !visible) return;
        const int64_t* stride = p.grad_bias_stride;
        static_cast<float*>(p.grad_bias)[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]] = ds;
      };
      differentiate_keys<P>(scores, row0, i0, lse, delta, s, dp, kept_of, store_grad_bias);
    }
    P::put(s, weights, first_key(), first_query() / Chunk<T>::kSize);
    P::put(dp, grads, first_key(), first_query() / Chunk<T>::kSize);
  }

  TFORMER_DEVICE void finish(float (&dk)[kLaneRows][kLaneColumns], float (&dv)[kLaneRows][kLaneColumns]) const {
    multiply_all(dk, static_cast<float>(p.scale));
    const unsigned found = suspect_rows<P>(dk) | suspect_rows<P>(dv);
    if (lane() == 0) suspects[warp()] = found;
    P::put(dk, k, first_key(), first_chunk());
    P::put(dv, v, first_key(), first_chunk());
    sync_block();  // rows are whole; of the warps that made them each stores some
    constexpr int kRows = kWarpRows / kSharing;
    const int first = warp() % kSharing * kRows, key0 = row0 + first;
    const int length = call.packed ? seq.Sk : static_cast<int>(p.Sk);  // keys past key_lengths get zeros
    const bool aligned = kPlain || call.aligned;
    k.store(first_key() + first, kRows, row_at<T>(p.grad_k, b, kv_head, seq.k_begin + key0), p.grad_k.stride[2],
            length - key0, static_cast<int>(p.D), aligned);
    v.store(first_key() + first, kRows, row_at<T>(p.grad_v, b, kv_head, seq.k_begin + key0), p.grad_v.stride[2],
            length - key0, static_cast<int>(p.Dv), aligned);
    unsigned of_rows = 0;
#pragma unroll
    for (int n = 0; n < kSharing; ++n) of_rows |= suspects[warp() / kSharing * kSharing + n] >> first;
#pragma unroll 1
    for (int n = 0; n < kRows; ++n) {
      if (of_rows >> n & 1 && key0 + n < length) {
        redo_grad_key<T, kPlain, true, true>(p, seq, b, kv_head, group, key0 + n);
      }
    }
  }
};

}  // namespace tformer::gpu
