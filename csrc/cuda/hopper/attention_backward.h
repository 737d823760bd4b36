// dq, dk and dv on sm_90a in one pass of five products, for calls that attention_choice.h lets through: the formulas of
// ../attention_backward.h, spread over warpgroups (Shah et al. 2024, FlashAttention-3). A block has a tile of keys and
// values and goes through the queries of all heads that share it. Scores are transposed, keys by queries, so that
// weights and their gradients are left operands of dv and dk where they are, in registers. For dq they go through
// shared memory: each warpgroup makes a 64 x 64 part of the sum over all keys of the tile.
//
// dq of a tile of queries is summed over tiles of keys in global memory, in float, by the copy engine, in the order of
// the keys: each block waits for its turn at the tile of queries. Whom it waits for has an earlier tile of keys of the
// same head, and blocks take their work by a ticket, earlier tiles first: so that block has begun, and of all blocks
// that have not ended the one with the first ticket waits for nobody. Queries come from the last to the first, which is
// the one order in which blocks that begin together arrive one after the other, causal or not.
#pragma once

#include "attention_backward_work.h"

namespace tformer::gpu {

template <class T, int kWidth, HopperExtra kExtra>
struct HopperBackward {
  static constexpr bool kDropout = kExtra == HopperExtra::dropout, kBias = kExtra == HopperExtra::bias;
  using Shape = HopperBackwardShape<kWidth>;
  using P = TensorCores<T, 2>;
  static constexpr int kGroups = Shape::kGroups, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  static constexpr int kBuffers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  static constexpr int kMultiplyBarrier = 1;  // of all warps that multiply
  static constexpr int kGroupBarrier = 2;     // of the first warpgroup that does, then of the second
  // dv is on its way before ds is made; with more queries registers would not do.
  static constexpr bool kEarly = kQueries == 64;
  using KeyTile = BoxTile<kKeys, kWidth>;
  using QueryTile = BoxTile<kQueries, kWidth>;
  using GradTile = BoxTile<kKeys, kQueries>;  // ds, transposed
  static constexpr int kSumBytes = kTileFloats * 4;
  static constexpr int kRowBytes = 2 * kQueries * 4;  // lse, as weights take it, and delta
  using Drops = GroupDropBits<kQueries>;
  static constexpr int kDropBytes = kDropout ? kGroups * Drops::kBytes : 0;
  static constexpr int kAlign = 1024;
  static constexpr size_t kSharedBytes = kAlign + 2 * KeyTile::kBytes + 2 * kBuffers * QueryTile::kBytes +
                                         kBuffers * GradTile::kBytes + kSumBytes + kBuffers * kRowBytes + kDropBytes +
                                         (1 + 3 * kBuffers) * sizeof(Handover) + sizeof(HopperKeyTile) + 16;
  static_assert(kSharedBytes <= size_t{227} << 10);

  // Divided by hand: all begin at multiples of 1024 but what comes after the sums.
  struct Shared {
    KeyTile k, v;
    char *q, *grad_o, *ds, *sums, *rows, *drops;
    Handover *kv, *q_handover, *grad_o_handover, *sums_handover;
    HopperKeyTile* job;
    bool* there;  // is a job

    TFORMER_DEVICE explicit Shared(char* shared)
        : k{shared},
          v{shared + KeyTile::kBytes},
          q(shared + 2 * KeyTile::kBytes),
          grad_o(q + kBuffers * QueryTile::kBytes),
          ds(grad_o + kBuffers * QueryTile::kBytes),
          sums(ds + kBuffers * GradTile::kBytes),
          rows(sums + kSumBytes),
          drops(rows + kBuffers * kRowBytes),
          kv(reinterpret_cast<Handover*>(drops + kDropBytes)),
          q_handover(kv + 1),
          grad_o_handover(q_handover + kBuffers),
          sums_handover(grad_o_handover + kBuffers),
          job(reinterpret_cast<HopperKeyTile*>(sums_handover + kBuffers)),
          there(reinterpret_cast<bool*>(job + 1)) {}

    TFORMER_DEVICE QueryTile q_tile(int n) const { return {q + buffer_of(n) * QueryTile::kBytes}; }
    TFORMER_DEVICE QueryTile grad_o_tile(int n) const { return {grad_o + buffer_of(n) * QueryTile::kBytes}; }
    TFORMER_DEVICE GradTile ds_tile(int n) const { return {ds + buffer_of(n) * GradTile::kBytes}; }
    TFORMER_DEVICE float* lse(int n) const { return reinterpret_cast<float*>(rows + buffer_of(n) * kRowBytes); }
    TFORMER_DEVICE float* delta(int n) const { return lse(n) + kQueries; }
  };

  const HopperBackwardCall& given;
  const AttentionCall& call;
  const AttentionParams& p;
  const Shared at;
  const HopperKeyTile& job;

  static TFORMER_DEVICE void run(const HopperBackwardCall& given, char* shared) {
    const Shared at(align_shared(shared, kAlign));
    if (warp() == 0) begin(given, at);
    sync_block();
    if (*at.there) HopperBackward{given, given.call, given.call.p, at, *at.job}.attend();
  }

  static TFORMER_DEVICE void begin(const HopperBackwardCall& given, const Shared& at) {
    const bool there = take_key_tile<T, kKeys, kQueries>(given, at.job);
    if (lane() != 0) return;
    *at.there = there;
    if (!there) return;
    mbarrier_init(&at.kv->full, 2);
    for (int n = 0; n < kBuffers; ++n) {
      mbarrier_init(&at.q_handover[n].full, 2);  // queries; lse and delta
      mbarrier_init(&at.q_handover[n].empty, 4 * kGroups);
      mbarrier_init(&at.grad_o_handover[n].full, 1);
      mbarrier_init(&at.grad_o_handover[n].empty, 4 * kGroups);
      mbarrier_init(&at.sums_handover[n].full, 4 * kGroups);
      mbarrier_init(&at.sums_handover[n].empty, 1);
    }
    mbarrier_publish();
  }

  TFORMER_DEVICE void attend() const {
    if (thread_index() < kWarpgroup) {
      fewer_registers<Shape::kFetchRegisters>();
      if (warp() == 0) fetch_all();
      if (warp() == 1) fetch_query_rows<T, kQueries, !kBias>(p, job, at.lse(0), at.q_handover);
      if (warp() >= 2) add_sums(warp() - 2);
    } else {
      more_registers<Shape::kRegisters>();
      multiply_all();
    }
  }

  // ---- The warps that fetch and send. ----

  TFORMER_DEVICE void fetch_all() const {
    const int batch = call.packed ? 0 : job.b;
    if (job.tiles > 0 && lane() == 0) {
      at.k.load(&given.k, job.k_begin + job.j0, job.kv_head, batch, &at.kv->full);
      at.v.load(&given.v, job.k_begin + job.j0, job.kv_head, batch, &at.kv->full);
    }
    sync_warp();
    job.for_each_tile(kQueries, [&](int n, int h, int i0) {
      const int row = job.q_begin + i0, phase = phase_of(n);
      fetch_tile(at.q_tile(n), given.q, at.q_handover[buffer_of(n)], phase, row, h, batch);
      fetch_tile(at.grad_o_tile(n), given.grad_o, at.grad_o_handover[buffer_of(n)], phase, row, h, batch);
    });
  }

  // Two warps do it in turn, as each waits until its sums have arrived.
  TFORMER_DEVICE void add_sums(int parity) const {
    job.for_each_tile(kQueries, [&](int n, int h, int i0) {
      if (lane() == 0 && buffer_of(n) == parity) {
        const int slot = slot_of(call, job.q_begin, job.b, h, i0);
        const bool first = job.range(p).begin(i0) / kKeys == job.tile;  // made anew each time: registers are short
        add_to_sums(given, job, slot, first, at.sums, at.sums_handover[parity], phase_of(n));
      }
      sync_warp();
    });
  }

  // ---- Warps that multiply. ----

  static TFORMER_DEVICE int group() { return shuffle_index(thread_index() / kWarpgroup, 0) - 1; }
  // First key of the warp, counted from the tile's.
  static TFORMER_DEVICE int first_row() { return 64 * group() + 16 * (warp() % 4); }

  TFORMER_DEVICE void multiply_all() const {
    float dk[2][kWidth / 4], dv[2][kWidth / 4];
    clear(dk);
    clear(dv);
    float s[2][kQueries / 4], dp[2][kQueries / 4], dq[2][16];
    uint32_t weights[kQueries / 16][4], grads[kQueries / 16][4];
    if (job.tiles > 0) mbarrier_wait(&at.kv->full, 0);
    const int count = job.tiles * job.group_size;
    QueryCounter at_tile(job);
    if constexpr (kDropout) draw(at_tile);
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      const int buffer = buffer_of(n);
      mbarrier_wait(&at.q_handover[buffer].full, phase_of(n));
      multiply_rows(s, at.k, at.q_tile(n));
      mbarrier_wait(&at.grad_o_handover[buffer].full, phase_of(n));
      multiply_rows(dp, at.v, at.grad_o_tile(n));
      const int h = at_tile.head(job), i0 = at_tile.tile * kQueries, row0 = job.j0 + first_row();
      TransposedBias<T, kBias && kEarly ? kQueries : 4> bias;
      // beside both products
      if constexpr (kBias && kEarly) bias.read(p, job.b, h, i0, row0);
      wgmma_wait<1>();  // the scores
      hold(s);
      if constexpr (kBias && kEarly) bias.add_to(s, 0, static_cast<float>(p.scale));
      if constexpr (kBias && !kEarly) add_transposed_bias<T, 8>(s, p, job.b, h, i0, row0);
      weigh<T, kExtra>(s, p, job, first_row(), at_tile.tile * kQueries, at.lse(n), drops());
      if constexpr (kEarly) {
        pack<true>(weights, s);
        multiply_down(dv, weights, at.grad_o_tile(n));
        wgmma_wait<1>();  // dp
      } else {
        // A loop of one pass: in a straight line ptxas takes the wait before the exponents.
        do {
          wgmma_wait<0>();
        } while (p.scale < 0);
      }
      hold(dp);
      subtract_delta<P, kDropout>(dp, s, at.delta(n), given.dropout_scale);
      if constexpr (kBias) {
        store_grad_bias<P>(p, job, at_tile.head(job), first_row(), at_tile.tile * kQueries, s, dp);
      }
      pack<false>(grads, dp);
      if constexpr (!kEarly) {
        pack<true>(weights, s);
        multiply_down(dv, weights, at.grad_o_tile(n));
      }
      put(grads, at.ds_tile(n));
      fence_async_proxy();
      sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);
      multiply_keys(dq, at.ds_tile(n));
      multiply_down(dk, grads, at.q_tile(n));
      wgmma_wait<1>();  // dv and dq
      hold(dv);
      hold(weights);
      hold(dq);
      release(at.grad_o_handover[buffer]);
      send(dq, n);
      at_tile.advance(job);
      if (kDropout && n + 1 < count) draw(at_tile);  // beside dk's product; here registers are free
      wgmma_wait<0>();
      hold(dk);
      hold(grads);
      release(at.q_handover[buffer]);
    }
    finish(dk, dv);
  }

  // s = a bT: 64 rows of the warpgroup, all queries.
  static TFORMER_DEVICE void multiply_rows(float (&s)[2][kQueries / 4], const KeyTile& a, const QueryTile& b) {
    const uint64_t rows = a.by_rows(64 * group()), columns = b.by_rows(0);
    hold(s);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      Wgmma<T, kQueries>::shared(s, advance(rows, KeyTile::column_bytes(d)),
                                 advance(columns, QueryTile::column_bytes(d)), d > 0);
    }
    wgmma_commit();
  }

  // o += w b, over all queries.
  static TFORMER_DEVICE void multiply_down(float (&o)[2][kWidth / 4], const uint32_t (&w)[kQueries / 16][4],
                                           const QueryTile& b) {
    const uint64_t columns = b.by_columns();
    hold(o);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      Wgmma<T, kWidth>::template registers<0>(o, w[i], advance(columns, i * 16 * kBoxRowBytes), true);
    }
    wgmma_commit();
  }

  // dq of 64 queries and 64 columns, over all keys: warpgroups share the queries of wide tiles, else the columns.
  TFORMER_DEVICE void multiply_keys(float (&dq)[2][16], const GradTile& ds) const {
    const int query_box = kQueries > 64 ? group() : 0, column_box = kQueries > 64 ? 0 : group();
    const uint64_t rows = advance(ds.by_columns(), query_box * GradTile::kBoxBytes);
    const uint64_t columns = advance(at.k.by_columns(), column_box * KeyTile::kBoxBytes);
    hold(dq);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const int bytes = j * 16 * kBoxRowBytes;
      Wgmma<T, 64>::across(dq, advance(rows, bytes), advance(columns, bytes), j > 0);
    }
    wgmma_commit();
  }

  // A left operand, where it is: as in TensorCores::multiply_down. kWeights: as pack_weights.
  template <bool kWeights>
  static TFORMER_DEVICE void pack(uint32_t (&to)[kQueries / 16][4], const float (&s)[2][kQueries / 4]) {
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* pair = &s[e % 2][4 * i + e / 2 * 2];
        to[i][e] = pack_weights < T, kWeights && kDropout > (pair[0], pair[1]);
      }
    }
  }

  // Where all warps have met for dq since the last bits were read.
  TFORMER_DEVICE void draw(const QueryCounter& of) const {
    drops().draw(given.dropout, job.b, of.head(job), of.tile * kQueries, job.j0 + 64 * group(),
                 kGroupBarrier + group());
  }
  TFORMER_DEVICE Drops drops() const { return {at.drops + group() * Drops::kBytes}; }

  // The warp's rows of what pack made into the tile.
  static TFORMER_DEVICE void put(const uint32_t (&packed)[kQueries / 16][4], const GradTile& tile) {
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        char* chunk = tile.at(first_row() + P::row(e % 2), 2 * i + e / 2);
        *reinterpret_cast<uint32_t*>(chunk + lane() % 4 * 4) = packed[i][e];
      }
    }
  }

  // dq of this warpgroup to the warp that sends it on.
  TFORMER_DEVICE void send(const float (&dq)[2][16], int n) const {
    // one buffer for all
    if (n > 0) mbarrier_wait(&at.sums_handover[buffer_of(n - 1)].empty, phase_of(n - 1));
    put_sums<0>(dq, at.sums + group() * kSumFloats * 4);
    fence_async_proxy();
    sync_warp();
    if (lane() == 0) mbarrier_arrive(&at.sums_handover[buffer_of(n)].full);
  }

  TFORMER_DEVICE void finish(float (&dk)[2][kWidth / 4], float (&dv)[2][kWidth / 4]) const {
    const int length = call.packed ? job.Sk : static_cast<int>(p.Sk);  // keys past key_lengths get zeros
    const int first = first_row(), row0 = job.j0 + first;
    gpu::multiply_all(dk, static_cast<float>(p.scale));
    if constexpr (kDropout) gpu::multiply_all(dv, given.dropout_scale);
    const unsigned suspects = suspect_rows<P>(dk) | suspect_rows<P>(dv);
    sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);  // products of all warps have read keys and values
    P::put(dk, at.k, first);
    P::put(dv, at.v, first);
    store_rows(at.k, first, 16, row_at<T>(p.grad_k, job.b, job.kv_head, job.k_begin + row0), p.grad_k.stride[2],
               length - row0, static_cast<int>(p.D), true);
    store_rows(at.v, first, 16, row_at<T>(p.grad_v, job.b, job.kv_head, job.k_begin + row0), p.grad_v.stride[2],
               length - row0, static_cast<int>(p.Dv), true);
#pragma unroll 1
    for (int n = 0; n < 16; ++n) {
      if (suspects >> n & 1 && row0 + n < length) {
        redo_grad_key<T, !kBias, true, true>(p, Positions(job.sequence()), job.b, job.kv_head, job.group_size,
                                             row0 + n);
      }
    }
  }
};

}  // namespace tformer::gpu
