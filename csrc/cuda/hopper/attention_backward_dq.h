// dq out of the sums that attention_backward.h and attention_backward_wide.h leave.
#pragma once

#include "attention_backward_work.h"

namespace tformer::gpu {

// A block for each tile of queries.
template <class T, int kWidth, bool kPlain>
struct HopperQueryGradients {
  using P = TensorCores<T, 2>;
  static constexpr int kQueries = HopperBackwardShape<kWidth>::kQueries;
  static constexpr int kThreads = kQueries / 16 * kWarp;
  using QueryTile = SharedTile<T, kQueries, kWidth>;
  static constexpr size_t kSharedBytes = QueryTile::kBytes;

  static TFORMER_DEVICE void run(const HopperBackwardCall& given, char* shared) {
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

  static TFORMER_DEVICE void finish(const HopperBackwardCall& given, const QueryTile& tile, int b, int h, int i0) {
    const AttentionParams& p = given.call.p;
    const Sequence sequence = sequence_of(p, b);
    const Positions seq(sequence);
    const Scores<T, kPlain> scores(p, sequence, b, h);
    const int first = 16 * warp(), row0 = i0 + first;
    const int slot = slot_of(given.call, seq.q_begin, b, h, i0);
    const int kv_head = h / static_cast<int>(p.Hq / p.Hk);
    float dq[2][kWidth / 4];
    clear(dq);
    if (given.turns[slot] != 0) load(dq, given.sums + int64_t{slot} * kTileFloats);  // else no key is seen
    multiply_all(dq, scores.scale);
    const unsigned suspects = suspect_rows<P>(dq);
    P::put(dq, tile, first);
    tile.store(first, 16, row_at<T>(p.grad_q, b, h, seq.q_begin + row0), p.grad_q.stride[2], seq.Sq - row0,
               static_cast<int>(p.D), true);
    for (int n = 0; n < 16; ++n) {
      if (suspects >> n & 1 && row0 + n < seq.Sq) redo_grad_query(p, scores, seq, b, h, kv_head, row0 + n);
    }
  }

  // As send left them.
  static TFORMER_DEVICE void load(float (&dq)[2][kWidth / 4], const float* sums) {
    constexpr int kSlots = hopper_slots_of_tile(kWidth);
    sums += thread_index() / kWarpgroup * kSumFloats + thread_index() % kWarpgroup * 4;
#pragma unroll
    for (int part = 0; part < kWidth / 64; ++part) {
#pragma unroll
      for (int m = 0; m < kSumChunks; ++m) {
        const float* from = sums + part % kSlots * kTileFloats + part / kSlots * kSumFloats;
        const Bits16Bytes chunk = load_16(from + m * kWarpgroup * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[m / 4][16 * part + m % 4 * 4 + e] = float_of_bits(chunk.word[e]);
      }
    }
  }
};

}  // namespace tformer::gpu
