// How the backward kernels for sm_90a share a call.
#pragma once

#include <gpu/hopper.h>

#include "../attention_dq_sums.h"
#include "attention_backward_dropout.h"
#include "attention_bias.h"
#include "attention_launch.h"
#include "box_tile.h"

namespace tformer::gpu {

// Up to width 128 registers of a thread are: dk and dv, kWidth / 2 each; scores and their gradients, kQueries / 2 each,
// and as operands kQueries / 4 each. Shared memory: keys, values; two tiles of queries, of do, and of gradients of
// scores; sums of dq. Above, in attention_backward_wide.h: dk, dv and dq, 64 each, scores and dp, 16 each. Shared
// memory: keys, values; two tiles of queries, one of do, two of weights and of their gradients; half of the sums of dq.
template <int kWidth>
struct HopperBackwardShape {
  static constexpr int kGroups = 2, kKeys = kWidth <= 128 ? 128 : 64;
  static constexpr int kQueries = hopper_backward_queries(kWidth);
  // of the 168 each that a block of 384 threads is launched with
  static constexpr int kFetchRegisters = 24, kRegisters = 240;
  static_assert(kFetchRegisters + kGroups * kRegisters <= (1 + kGroups) * 168);
};

// Floats of dq that a warpgroup adds up at a time, and those of a slot. They lie as threads hold them: chunk n of 16
// bytes of thread t at 128 n + t, 64 x 64 after 64 x 64 along rows or columns, whichever are more. Above width 128 a
// tile has two slots: columns 0 to 63 and 128 to 191, and those after these.
constexpr int kSumFloats = 64 * 64, kSumChunks = kSumFloats / 4 / kWarpgroup, kTileFloats = 2 * kSumFloats;
static_assert(kTileFloats == kHopperSlotFloats);

// The first slot of a tile of queries: where its sums lie, and its turn.
TFORMER_DEVICE int slot_of(const AttentionCall& call, int q_begin, int b, int h, int i0) {
  const int width = static_cast<int>(call.p.D > call.p.Dv ? call.p.D : call.p.Dv);
  return query_tile_of(call, hopper_backward_queries(width), q_begin, b, h, i0) * hopper_slots_of_tile(width);
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

  // f(n, head, first query) for each tile of queries, in order. By whole warps.
  template <class F>
  TFORMER_DEVICE void for_each_tile(int queries, F&& f) const;
};

// Goes through a job's tiles of queries, through each of all heads: so a block that has fewer tiles of a head never
// waits for one that has more, as it would where heads came one after the other.
struct QueryCounter {
  int left, tile;  // heads, the present one among them
  TFORMER_DEVICE explicit QueryCounter(const HopperKeyTile& job)
      : left(job.group_size), tile(job.first_tile + job.tiles - 1) {}
  TFORMER_DEVICE int head(const HopperKeyTile& job) const { return (job.kv_head + 1) * job.group_size - left; }
  TFORMER_DEVICE void advance(const HopperKeyTile& job) {
    if (--left == 0) left = job.group_size, --tile;
  }
};

template <class F>
TFORMER_DEVICE void HopperKeyTile::for_each_tile(int queries, F&& f) const {
  int n = 0;
#pragma unroll 1
  for (QueryCounter at(*this); at.tile >= first_tile; at.advance(*this), ++n) f(n, at.head(*this), at.tile * queries);
}

// ---- What a block's warps do, whatever the width. ----

// The block's work, by its ticket; whether there is some. By one warp.
template <class T, int kKeys, int kQueries>
TFORMER_DEVICE bool take_key_tile(const HopperBackwardCall& given, HopperKeyTile* job) {
  const AttentionCall& call = given.call;
  const AttentionParams& p = call.p;
  const int ticket = shuffle_index(lane() == 0 ? take_ticket(given.ticket) : 0, 0);
  Work work = work_of(call.grid, ticket);
  int64_t b = work.head / p.Hk, h = work.head % p.Hk;
  if (call.packed) {
    h = work.head;
    if (!find_sequence(p.cu_seqlens_k, p.B, kKeys, work.tile, b)) return false;
  }
  const int job_b = static_cast<int>(b), tile = static_cast<int>(work.tile);
  const Scores<T, true> scores(p, sequence_of(p, job_b), job_b, 0);  // heads share a mask
  uint32_t shown[4] = {~uint32_t{0}, ~uint32_t{0}, ~uint32_t{0}, ~uint32_t{0}};
#pragma unroll
  for (int n = 0; n < kKeys / kWarp; ++n) {
    const int j = tile * kKeys + n * kWarp + lane();
    shown[n] = ballot(j >= scores.range.Sk || scores.shows_key(j));
  }
  if (lane() == 0) *job = HopperKeyTile(p, job_b, static_cast<int>(h), tile, kKeys, kQueries, shown);
  return true;
}

// A tile of queries or do, when the phase before this one has ended with all that was there read. By one warp.
template <class Tile>
TFORMER_DEVICE void fetch_tile(const Tile& to, const TensorMap& map, Handover& handover, int phase, int row, int head,
                               int batch) {
  mbarrier_wait(&handover.empty, phase ^ 1);  // at first, the phase before the first
  if (lane() == 0) to.load(&map, row, head, batch, &handover.full);
  sync_warp();
}

// lse, as weights take it, and delta, which may begin anywhere, beside each tile of queries: kQueries of one, then of
// the other, in a ring of two. By one warp.
template <class T, int kQueries, bool kPlain>
TFORMER_DEVICE void fetch_query_rows(const AttentionParams& p, const HopperKeyTile& job, float* rows,
                                     Handover* handovers) {
  const Scores<T, kPlain> scores(p, job.sequence(), job.b, 0);
  job.for_each_tile(kQueries, [&](int n, int h, int i0) {
    constexpr int kEach = kQueries / kWarp;
    const int64_t from = job.b * p.lse_stride[0] + h * p.lse_stride[1] + job.q_begin + i0 + lane();
    float lse[kEach], delta[kEach];
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
      const bool there = i0 + lane() + m * kWarp < job.Sq;
      lse[m] = there ? scores.held_lse(static_cast<const float*>(p.lse)[from + m * kWarp]) : kInfinity<float>;
      delta[m] = there ? static_cast<float>(p.delta[from + m * kWarp]) : 0.0f;
    }
    Handover& handover = handovers[buffer_of(n)];
    float* to = rows + buffer_of(n) * 2 * kQueries + lane();
    mbarrier_wait(&handover.empty, phase_of(n) ^ 1);
#pragma unroll
    for (int m = 0; m < kEach; ++m) to[m * kWarp] = lse[m], to[kQueries + m * kWarp] = delta[m];
    sync_warp();
    if (lane() == 0) mbarrier_arrive(&handover.full);
  });
}

// A slot's part of dq, when it has arrived, goes to the sums when the tiles of keys before have added theirs; the first
// one, with the first key that a query of the tile sees, is stored. By one thread.
TFORMER_DEVICE void add_to_sums(const HopperBackwardCall& given, const HopperKeyTile& job, int slot, bool first,
                                const char* from, Handover& handover, int phase) {
  constexpr int kBytes = kTileFloats * 4;
  int32_t* turn = given.turns + slot;
  float* to = given.sums + int64_t{slot} * kTileFloats;
  if (!first) wait_for_turn_of(turn, job.tile);
  mbarrier_wait(&handover.full, phase);
  fence_async_proxy_global();
  if (first) {
    bulk_store(to, from, kBytes);
  } else {
    bulk_add(to, from, kBytes);
  }
  bulk_commit();
  bulk_wait_read<0>();
  mbarrier_arrive(&handover.empty);
  bulk_wait<0>();
  fence_async_proxy_global();
  give_turn(turn, job.tile + 1);
}

// This warp has read what the buffer holds.
TFORMER_DEVICE void release(Handover& handover) {
  sync_warp();
  if (lane() == 0) mbarrier_arrive(&handover.empty);
}

// Numbers beside the queries of scores' columns c and c + 1.
struct alignas(8) Two {
  float x[2];
};
template <class P>
TFORMER_DEVICE Two two_of(const float* rows, int c) {
  return *reinterpret_cast<const Two*>(rows + P::column(c));
}

// Products become weights: a warp's 16 keys, from the tile's `row` on, and queries from i0 on. With a bias
// they are scores already. With dropout, those that are dropped become negative.
template <class T, HopperExtra kExtra, int kC>
TFORMER_DEVICE void weigh(float (&s)[2][kC], const AttentionParams& p, const HopperKeyTile& job, int row, int i0,
                          const float* lse, const GroupDropBits<4 * kC>& drops) {
  using P = TensorCores<T, 2>;
  constexpr bool kDropout = kExtra == HopperExtra::dropout, kBias = kExtra == HopperExtra::bias;
  if (i0 < job.all_begin || i0 + 4 * kC > job.all_end) {
    const KeyRangeOf<int> range = job.range(p);
    const int lane_i0 = i0 + P::first_column();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at_row = row + P::row(r), j = job.j0 + at_row, begin = range.query_begin(j) - lane_i0;
      const bool shown = job.shown[at_row / kWarp] >> at_row % kWarp & 1;
      const int end = j < job.Sk && shown ? range.query_end(j, job.Sq) - lane_i0 : 0;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const int i = P::column_offset(c);
        s[r][c] = i >= begin && i < end ? s[r][c] : -kInfinity<float>;
      }
    }
  }
  const float unit = static_cast<float>(p.scale) * Exponent<T>::kUnit;
#pragma unroll
  for (int c = 0; c < kC; c += 2) {
    const Two held = two_of<P>(lse, c);
    const uint32_t dropped = kDropout ? drops.word(P::column(c)) : 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = s[e / 2][c + e % 2];
      if constexpr (kBias) {  // hidden: whatever lse is, since no gradient of a bias is redone
        x = x == -kInfinity<float> ? 0.0f : Exponent<T>::power((x - held.x[e % 2]) * Exponent<T>::kUnit);
      } else {
        x = Exponent<T>::power(fma(x, unit, -held.x[e % 2]));
      }
      if constexpr (kDropout) x = drops.marked(x, dropped, e / 2, e % 2);
    }
  }
}

// dp becomes ds, of weights as weigh leaves them; the others have dropout's factor.
template <class P, bool kDropout, int kC>
TFORMER_DEVICE void subtract_delta(float (&dp)[2][kC], const float (&weights)[2][kC], const float* delta,
                                   float factor) {
#pragma unroll
  for (int c = 0; c < kC; c += 2) {
    const Two subtracted = two_of<P>(delta, c);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = dp[e / 2][c + e % 2];
      const float weight = weights[e / 2][c + e % 2];
      if constexpr (kDropout) x = weight < 0 ? 0.0f : x * factor;
      x = (kDropout ? absolute(weight) : weight) * (x - subtracted.x[e % 2]);
    }
  }
}

// The gradient of the bias, where it is wanted: ds, as subtract_delta leaves it, of pairs that are in no other tile.
// What has no weight has no gradient, whatever dp is.
template <class P, int kC>
TFORMER_DEVICE void store_grad_bias(const AttentionParams& p, const HopperKeyTile& job, int h, int row, int i0,
                                    const float (&weights)[2][kC], const float (&ds)[2][kC]) {
  if (!p.grad_bias) return;
  const int lane_i0 = i0 + P::first_column(), j = job.j0 + row + P::row(0), offset = P::row(1) - P::row(0);
  const int64_t stride = p.grad_bias_stride[2];
  float* at = static_cast<float*>(p.grad_bias) + job.b * p.grad_bias_stride[0] + h * p.grad_bias_stride[1] + j;
  at += lane_i0 * stride;
  const int rows = job.Sq - lane_i0;
  const bool first = j < job.Sk, second = j + offset < job.Sk;
#pragma unroll
  for (int c = 0; c < kC; ++c) {  // step by step, as it is read
    const bool there = P::column_offset(c) < rows;
    if (there && first) at[0] = weights[0][c] == 0 ? 0.0f : ds[0][c];
    if (there && second) at[offset] = weights[1][c] == 0 ? 0.0f : ds[1][c];
    at += c % 2 == 0 ? stride : 7 * stride;
  }
}

// Two weights as an operand of dv: those that are dropped are 0.
template <class T, bool kDropout>
TFORMER_DEVICE uint32_t pack_weights(float low, float high) {
  return kDropout ? pack_two_positive<T>(low, high) : pack_two<T>(low, high);
}

// 64 x 64 of dq, columns kFirst and on of what the lane has, to where the warpgroup's part of the sums lies.
template <int kFirst, int kC>
TFORMER_DEVICE void put_sums(const float (&dq)[2][kC], char* to) {
  to += thread_index() % kWarpgroup * 16;
#pragma unroll
  for (int m = 0; m < kSumChunks; ++m) {
    const float* x = &dq[m / 4][kFirst + m % 4 * 4];
    store_16(to + m * kWarpgroup * 16, {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}});
  }
}

}  // namespace tformer::gpu
