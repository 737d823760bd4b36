// dq out of the sums that one pass over tiles of keys leaves in global memory: attention_dqkv.h, and on sm_90a
// hopper/attention_backward.h and attention_backward_wide.h.
#pragma once

#include "attention_backward.h"

namespace tformer::gpu {

// Counts tiles of `rows` queries of all batches and heads; in packed sequences as find_sequence does, up to a gap after
// each sequence.
TFORMER_DEVICE int query_tile_of(const AttentionCall& call, int rows, int q_begin, int b, int h, int i0) {
  const int first = call.packed ? q_begin / rows + b : 0, tiles = static_cast<int>(query_tiles(call, rows));
  return (call.packed ? h : b * static_cast<int>(call.p.Hq) + h) * tiles + first + i0 / rows;
}

// How attention_dqkv.h leaves the sums of a tile of queries: 16 x 8 after 16 x 8, along rows; of each, first float of
// all lanes, then the second, as TensorCores have them.
template <int kWidth>
struct OnePassSums {
  static constexpr int kQueries = kOnePassQueries, kFloats = kQueries * kWidth;

  static TFORMER_DEVICE int first_float(int row, int chunk) { return (row / 16 * (kWidth / 8) + chunk) * 4 * kWarp; }
  static constexpr int next_float(int r, int c) {
    return ((r / 2 * (kWidth / 8) + c / 2) * 4 + r % 2 * 2 + c % 2) * kWarp;
  }

  // What a warp has of rows from `row` and columns from 8 * chunk on.
  template <int kLaneRows, int kC>
  static TFORMER_DEVICE void add(float* sums, int row, int chunk, const float (&dq)[kLaneRows][kC], bool first) {
    sums += first_float(row, chunk) + lane();
    const auto for_each = [&](auto&& put) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
        for (int c = 0; c < kC; ++c) put(sums + next_float(r, c), dq[r][c]);
      }
    };
    if (first) {
      for_each([](float* to, float x) { *to = x; });
    } else {
      for_each([](float* to, float x) { add_global(to, x); });
    }
  }

  // For the kernel below.
  static TFORMER_DEVICE int slot_of(const OnePassCall& given, int q_begin, int b, int h, int i0) {
    return query_tile_of(given.call, kQueries, q_begin, b, h, i0);
  }
  static TFORMER_DEVICE void load(float (&dq)[2][kWidth / 4], const float* sums) {
    sums += first_float(16 * warp(), 0) + lane();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kWidth / 4; ++c) dq[r][c] = sums[next_float(r, c)];
    }
  }
};

// A block for each tile of Sums::kQueries queries, 16 of each warp. Call: has call, sums and turns.
template <class T, int kWidth, class Sums, class Call>
struct QueryGradientsOfSums {
  using P = TensorCores<T, 2>;
  static constexpr int kQueries = Sums::kQueries;
  static constexpr int kThreads = kQueries / 16 * kWarp;
  using QueryTile = SharedTile<T, kQueries, kWidth>;
  static constexpr size_t kSharedBytes = QueryTile::kBytes;

  static TFORMER_DEVICE void run(const Call& given, char* shared) {
    const AttentionCall& call = given.call;
    const AttentionParams& p = call.p;
    Work work = work_of(call.grid, block_index<0>());
    int64_t b = work.head / p.Hq, h = work.head % p.Hq;
    if (call.packed) {
      h = work.head;
      if (!find_sequence(p.cu_seqlens_q, p.B, kQueries, work.tile, b)) return;
    }
    finish(given, {shared}, static_cast<int>(b), static_cast<int>(h), static_cast<int>(work.tile) * kQueries);
  }

  static TFORMER_DEVICE void finish(const Call& given, const QueryTile& tile, int b, int h, int i0) {
    const AttentionParams& p = given.call.p;
    const Sequence sequence = sequence_of(p, b);
    const Positions seq(sequence);
    const Scores<T, false> scores(p, sequence, b, h);
    const int first = 16 * warp(), row0 = i0 + first;
    const int slot = Sums::slot_of(given, seq.q_begin, b, h, i0);
    const int kv_head = h / static_cast<int>(p.Hq / p.Hk);
    float dq[2][kWidth / 4];
    clear(dq);
    if (given.turns[slot] != 0) Sums::load(dq, given.sums + int64_t{slot} * Sums::kFloats);  // else no key is seen
    multiply_all(dq, scores.scale);
    const unsigned suspects = suspect_rows<P>(dq);
    P::put(dq, tile, first);
    tile.store(first, 16, row_at<T>(p.grad_q, b, h, seq.q_begin + row0), p.grad_q.stride[2], seq.Sq - row0,
               static_cast<int>(p.D), given.call.aligned);
    for (int n = 0; n < 16; ++n) {
      if (suspects >> n & 1 && row0 + n < seq.Sq) redo_grad_query(p, scores, seq, b, h, kv_head, row0 + n);
    }
  }
};

}  // namespace tformer::gpu
