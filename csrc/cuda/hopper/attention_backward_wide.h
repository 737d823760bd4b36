// As attention_backward.h, which says what comes of it and in which order, for head dimensions 129 to 256. dk and dv of
// 64 keys are all that two warpgroups' registers hold, so they share a tile of 64 keys: of the scores each makes 32
// queries, of dk, dv and dq 128 columns. For the latter both need all weights and their gradients, which go through
// shared memory. Scores of the next tile of queries are made while dq of this one leaves.
#pragma once

#include "attention_backward_work.h"

namespace tformer::gpu {

template <class T, HopperExtra kExtra>
struct HopperWideBackward {
  static constexpr bool kDropout = kExtra == HopperExtra::dropout, kBias = kExtra == HopperExtra::bias;
  static constexpr int kWidth = 256, kHalf = kWidth / 2;  // columns of a warpgroup
  using Shape = HopperBackwardShape<kWidth>;
  using P = TensorCores<T, 2>;
  static constexpr int kGroups = Shape::kGroups, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  static constexpr int kOwn = kQueries / kGroups;  // queries of a warpgroup's scores
  static constexpr int kBuffers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  static constexpr int kMultiplyBarrier = 1;  // of all warps that multiply
  static constexpr int kGroupBarrier = 2;     // of the first warpgroup that does, then of the second
  using KeyTile = BoxTile<kKeys, kWidth>;
  using QueryTile = BoxTile<kQueries, kWidth>;
  using HalfTile = BoxTile<64, kHalf>;         // of one of both
  using ScoreTile = BoxTile<kKeys, kQueries>;  // weights, ds: transposed
  static constexpr int kSumBytes = kTileFloats * 4;
  static constexpr int kRowBytes = 2 * kQueries * 4;  // lse, as weights take it, and delta
  using Drops = GroupDropBits<kOwn>;
  static constexpr int kDropBytes = kDropout ? kGroups * Drops::kBytes : 0;
  static constexpr int kAlign = 1024;
  // do has one buffer: it is free after dv, and wanted after the next scores.
  static constexpr size_t kSharedBytes = kAlign + 2 * KeyTile::kBytes + (kBuffers + 1) * QueryTile::kBytes +
                                         2 * kBuffers * ScoreTile::kBytes + kSumBytes + kBuffers * kRowBytes +
                                         kDropBytes + (2 + 2 * kBuffers) * sizeof(Handover) + sizeof(HopperKeyTile) +
                                         4 * kGroups * 4 + 16;
  static_assert(kSharedBytes <= size_t{227} << 10);

  // Divided by hand: all begin at multiples of 1024 but what comes after the sums.
  struct Shared {
    KeyTile k, v;
    char* q;
    QueryTile grad_o;
    char *weights, *ds, *sums, *rows, *drops;
    Handover *kv, *grad_o_handover, *q_handover, *sums_handover;
    HopperKeyTile* job;
    uint32_t* suspects;  // of each warp that multiplies
    bool* there;         // is a job

    TFORMER_DEVICE explicit Shared(char* shared)
        : k{shared},
          v{shared + KeyTile::kBytes},
          q(shared + 2 * KeyTile::kBytes),
          grad_o{q + kBuffers * QueryTile::kBytes},
          weights(grad_o.data + QueryTile::kBytes),
          ds(weights + kBuffers * ScoreTile::kBytes),
          sums(ds + kBuffers * ScoreTile::kBytes),
          rows(sums + kSumBytes),
          drops(rows + kBuffers * kRowBytes),
          kv(reinterpret_cast<Handover*>(drops + kDropBytes)),
          grad_o_handover(kv + 1),
          q_handover(grad_o_handover + 1),
          sums_handover(q_handover + kBuffers),
          job(reinterpret_cast<HopperKeyTile*>(sums_handover + kBuffers)),
          suspects(reinterpret_cast<uint32_t*>(job + 1)),
          there(reinterpret_cast<bool*>(suspects + 4 * kGroups)) {}

    TFORMER_DEVICE QueryTile q_tile(int n) const { return {q + buffer_of(n) * QueryTile::kBytes}; }
    TFORMER_DEVICE ScoreTile weights_tile(int n) const { return {weights + buffer_of(n) * ScoreTile::kBytes}; }
    TFORMER_DEVICE ScoreTile ds_tile(int n) const { return {ds + buffer_of(n) * ScoreTile::kBytes}; }
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
    if (*at.there) HopperWideBackward{given, given.call, given.call.p, at, *at.job}.attend();
  }

  static TFORMER_DEVICE void begin(const HopperBackwardCall& given, const Shared& at) {
    const bool there = take_key_tile<T, kKeys, kQueries>(given, at.job);
    if (lane() != 0) return;
    *at.there = there;
    if (!there) return;
    mbarrier_init(&at.kv->full, 2);
    mbarrier_init(&at.grad_o_handover->full, 1);
    mbarrier_init(&at.grad_o_handover->empty, 4 * kGroups);
    for (int n = 0; n < kBuffers; ++n) {
      mbarrier_init(&at.q_handover[n].full, 2);  // queries; lse and delta
      mbarrier_init(&at.q_handover[n].empty, 4 * kGroups);
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
      const int row = job.q_begin + i0;
      fetch_tile(at.q_tile(n), given.q, at.q_handover[buffer_of(n)], phase_of(n), row, h, batch);
      fetch_tile(at.grad_o, given.grad_o, *at.grad_o_handover, n & 1, row, h, batch);
    });
  }

  // Each of two warps has one of the two slots of a tile of queries: chunk 2 n + half of those that pass through one
  // buffer.
  TFORMER_DEVICE void add_sums(int half) const {
    job.for_each_tile(kQueries, [&](int n, int h, int i0) {
      if (lane() == 0) {
        const int slot = slot_of(call, job.q_begin, job.b, h, i0) + half;
        const bool first = job.range(p).begin(i0) / kKeys == job.tile;  // made anew each time: registers are short
        add_to_sums(given, job, slot, first, at.sums, at.sums_handover[half], n & 1);
      }
      sync_warp();
    });
  }

  // ---- Warps that multiply. ----

  static TFORMER_DEVICE int group() { return shuffle_index(thread_index() / kWarpgroup, 0) - 1; }
  // First row of the warp in products of 64.
  static TFORMER_DEVICE int first_row() { return 16 * (warp() % 4); }
  // The warpgroup's columns.
  template <class Tile>
  static TFORMER_DEVICE HalfTile half_of(const Tile& tile) {
    return {tile.data + group() * HalfTile::kBytes};
  }

  // The tensor cores have work while dq of a tile leaves and the next weights are made. Each pass of the loop ends with
  // all products done: ptxas follows none into the next one.
  TFORMER_DEVICE void multiply_all() const {
    float dk[2][kHalf / 4], dv[2][kHalf / 4], dq[2][kHalf / 4];
    clear(dk);
    clear(dv);
    float s[2][kOwn / 4], dp[2][kOwn / 4];
    const int last = job.tiles * job.group_size - 1;
    QueryCounter at_tile(job);
    if (last >= 0) {
      mbarrier_wait(&at.kv->full, 0);
      start_scores(s, 0);
      start_dp(dp, 0);
      if constexpr (kDropout) draw(at_tile);
      wgmma_wait<1>();
      hold(s);
      differentiate(s, dp, 0, at_tile);
#pragma unroll 1
      for (int n = 0; n < last; ++n) {
        at_tile.advance(job);
        start_gradients(dk, dv, dq, n);
        start_scores(s, n + 1);
        wgmma_wait<3>();
        hold(dv);
        release(*at.grad_o_handover);
        wgmma_wait<2>();
        hold(dq);
        send<0>(dq, n);
        start_dp(dp, n + 1);
        wgmma_wait<2>();
        hold(dk);
        release(at.q_handover[buffer_of(n)]);
        send<1>(dq, n);
        if constexpr (kDropout) draw(at_tile);  // beside the product of dp
        wgmma_wait<1>();
        hold(s);
        differentiate(s, dp, n + 1, at_tile);
      }
      start_gradients(dk, dv, dq, last);
      wgmma_wait<1>();
      hold(dv);
      hold(dq);
      send<0>(dq, last);
      send<1>(dq, last);
      wgmma_wait<0>();
      hold(dk);
    }
    finish(dk, dv);
  }

  TFORMER_DEVICE void start_scores(float (&s)[2][kOwn / 4], int n) const {
    mbarrier_wait(&at.q_handover[buffer_of(n)].full, phase_of(n));
    multiply_rows(s, at.k, at.q_tile(n));
  }
  TFORMER_DEVICE void start_dp(float (&dp)[2][kOwn / 4], int n) const {
    mbarrier_wait(&at.grad_o_handover->full, n & 1);
    multiply_rows(dp, at.v, at.grad_o);
  }
  TFORMER_DEVICE void start_gradients(float (&dk)[2][kHalf / 4], float (&dv)[2][kHalf / 4], float (&dq)[2][kHalf / 4],
                                      int n) const {
    multiply_down(dv, at.weights_tile(n), at.grad_o);
    multiply_keys(dq, at.ds_tile(n));
    multiply_down(dk, at.ds_tile(n), at.q_tile(n));
  }

  // Scores and dp, which is on its way, become weights and ds in shared memory. Who read there two tiles before has
  // waited for it before the last meeting.
  TFORMER_DEVICE void differentiate(float (&s)[2][kOwn / 4], float (&dp)[2][kOwn / 4], int n,
                                    const QueryCounter& of) const {
    const int first = kOwn * group();
    if constexpr (kBias) {
      add_transposed_bias<T, 8>(s, p, job.b, of.head(job), of.tile * kQueries + first, job.j0 + first_row());
    }
    weigh<T, kExtra>(s, p, job, first_row(), of.tile * kQueries + first, at.lse(n) + first, drops());
    put<true>(s, at.weights_tile(n), first);
    wgmma_wait<0>();
    hold(dp);
    subtract_delta<P, kDropout>(dp, s, at.delta(n) + first, given.dropout_scale);
    if constexpr (kBias) store_grad_bias<P>(p, job, of.head(job), first_row(), of.tile * kQueries + first, s, dp);
    put<false>(dp, at.ds_tile(n), first);
    fence_async_proxy();
    sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);
  }

  // s = a bT: all keys, the warpgroup's queries.
  static TFORMER_DEVICE void multiply_rows(float (&s)[2][kOwn / 4], const KeyTile& a, const QueryTile& b) {
    // Moved by a 0 that the compiler does not know: else it keeps the descriptors of keys and values, and spills them.
    const KeyTile moved{a.data + shuffle_index(0, 0)};
    const uint64_t rows = moved.by_rows(0), columns = b.by_rows(kOwn * group());
    hold(s);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      Wgmma<T, kOwn>::shared(s, advance(rows, KeyTile::column_bytes(d)), advance(columns, QueryTile::column_bytes(d)),
                             d > 0);
    }
    wgmma_commit();
  }

  // o += w b, over all queries: all keys, the warpgroup's columns.
  static TFORMER_DEVICE void multiply_down(float (&o)[2][kHalf / 4], const ScoreTile& w, const QueryTile& b) {
    const uint64_t rows = w.by_rows(0), columns = half_of(b).by_columns();
    hold(o);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      Wgmma<T, kHalf>::down(o, advance(rows, ScoreTile::column_bytes(i)), advance(columns, i * 16 * kBoxRowBytes),
                            true);
    }
    wgmma_commit();
  }

  // dq, over all keys: all queries, the warpgroup's columns.
  TFORMER_DEVICE void multiply_keys(float (&dq)[2][kHalf / 4], const ScoreTile& ds) const {
    const uint64_t rows = ds.by_columns(), columns = half_of(at.k).by_columns();
    hold(dq);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const int bytes = j * 16 * kBoxRowBytes;
      Wgmma<T, kHalf>::across(dq, advance(rows, bytes), advance(columns, bytes), j > 0);
    }
    wgmma_commit();
  }

  // Where all warps have met since the last bits were read.
  TFORMER_DEVICE void draw(const QueryCounter& of) const {
    const int first = of.tile * kQueries + kOwn * group();
    drops().draw(given.dropout, job.b, of.head(job), first, job.j0, kGroupBarrier + group());
  }
  TFORMER_DEVICE Drops drops() const { return {at.drops + group() * Drops::kBytes}; }

  // The warp's rows and the warpgroup's queries, from `first` on, into the tile, where ScoreTile::at has them: 8 rows
  // apart chunks lie alike, and a warpgroup begins with a multiple of 4 chunks. kWeights: as pack_weights.
  template <bool kWeights>
  static TFORMER_DEVICE void put(const float (&s)[2][kOwn / 4], const ScoreTile& tile, int first) {
    static_assert(ScoreTile::kBoxes == 1 && kOwn / 8 == 4);
    const int row = first_row() + P::row(0), first_chunk = (first / 8 ^ row) & 7;
    char* to = tile.data + row * kBoxRowBytes + lane() % 4 * 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn / 4; c += 2) {
        char* pair = to + r * 8 * kBoxRowBytes + (first_chunk ^ c / 2) * 16;
        *reinterpret_cast<uint32_t*>(pair) = pack_weights < T, kWeights && kDropout > (s[r][c], s[r][c + 1]);
      }
    }
  }

  // 64 of the warpgroup's columns of dq to the warp that sends them on.
  template <int kPart>
  TFORMER_DEVICE void send(const float (&dq)[2][kHalf / 4], int n) const {
    const int chunk = 2 * n + kPart;  // one buffer for all
    if (chunk > 0) mbarrier_wait(&at.sums_handover[buffer_of(chunk - 1)].empty, phase_of(chunk - 1));
    put_sums<16 * kPart>(dq, at.sums + group() * kSumFloats * 4);
    fence_async_proxy();
    sync_warp();
    if (lane() == 0) mbarrier_arrive(&at.sums_handover[kPart].full);
  }

  // The warpgroups put their columns into the tiles of keys and values, then one stores dk and the other dv.
  TFORMER_DEVICE void finish(float (&dk)[2][kHalf / 4], float (&dv)[2][kHalf / 4]) const {
    const int length = call.packed ? job.Sk : static_cast<int>(p.Sk);  // keys past key_lengths get zeros
    const int first = first_row(), row0 = job.j0 + first, own_warp = warp() % 4, own_group = group();
    gpu::multiply_all(dk, static_cast<float>(p.scale));
    if constexpr (kDropout) gpu::multiply_all(dv, given.dropout_scale);
    const unsigned own_suspects = suspect_rows<P>(dk) | suspect_rows<P>(dv);
    if (lane() == 0) at.suspects[4 * own_group + own_warp] = own_suspects;
    sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);  // products of all warps have read keys and values
    P::put(dk, half_of(at.k), first);
    P::put(dv, half_of(at.v), first);
    sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);
    const bool keys = own_group == 0;
    const Rows& to = keys ? p.grad_k : p.grad_v;
    const KeyTile from{at.k.data + (keys ? 0 : KeyTile::kBytes)};  // at.v: chosen between, both would go to memory
    store_rows(from, first, 16, row_at<T>(to, job.b, job.kv_head, job.k_begin + row0), to.stride[2], length - row0,
               static_cast<int>(keys ? p.D : p.Dv), true);
    const unsigned suspects = at.suspects[own_warp] | at.suspects[4 + own_warp];
    sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);  // rows are stored before they are redone
    const int first_redone = 8 * own_group;
#pragma unroll 1
    for (int n = first_redone; n < first_redone + 8; ++n) {
      if (suspects >> n & 1 && row0 + n < length) {
        redo_grad_key<T, !kBias, true, true>(p, Positions(job.sequence()), job.b, job.kv_head, job.group_size,
                                             row0 + n);
      }
    }
  }
};

}  // namespace tformer::gpu
