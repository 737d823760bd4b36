// o = softmax(scores) v on sm_90a, for plain calls of 16-bit elements: the algorithm of ../attention_forward.h, spread
// over warpgroups (Shah et al. 2024, FlashAttention-3). One warp has the copy engine fetch tiles, two at a time of keys
// and of values; the other warpgroups each multiply 64 queries with them. The product of a tile's keys runs beside that
// of the values before, and its softmax while the latter goes on. Warpgroups take turns in handing out products, so
// that one multiplies while the other exponentiates.
#pragma once

#include <gpu/hopper.h>

#include "../attention_rows.h"
#include "../attention_work.h"
#include "attention_launch.h"
#include "box_tile.h"

namespace tformer::gpu {

// Registers of a thread: o, kWidth / 2; scores, kKeys / 2; weights, kKeys / 4. Shared memory: one tile of queries, two
// of keys, two of values, up to 224 KB.
template <int kWidth>
struct HopperShape {
  static constexpr int kGroups = kWidth == 64 ? 3 : 2;  // warpgroups that multiply
  static constexpr int kKeys = kWidth == 256 ? 80 : kWidth == 128 ? 128 : 112;
  static constexpr int kRows = 64 * kGroups;
  // of the 168 (three groups: 128) each that a block is launched with; the fetching warpgroup gives up what others need
  static constexpr int kFetchRegisters = kGroups == 2 ? 24 : 32, kRegisters = kGroups == 2 ? 240 : 160;
  static_assert(kFetchRegisters + kGroups * kRegisters <= (1 + kGroups) * (kGroups == 2 ? 168 : 128));
};

// A block's tile of queries, and the tiles of the keys that some of them see. What follows from these is made anew
// where it is wanted: registers are short.
struct HopperTile {
  int b, h, i0;
  int first_key0, count;

  TFORMER_DEVICE HopperTile(const AttentionCall& call, int64_t b_, int64_t h_, int64_t tile, int rows, int keys)
      : b(static_cast<int>(b_)), h(static_cast<int>(h_)), i0(static_cast<int>(tile) * rows) {
    const Sequence seq = sequence_of(call.p, b);
    const KeyRangeOf<int> range(call.p, seq);
    const int key_begin = range.begin(i0), key_end = range.end(smaller(i0 + rows, static_cast<int>(seq.Sq)) - 1);
    first_key0 = key_begin / keys * keys;
    count = key_end > key_begin ? (key_end - first_key0 + keys - 1) / keys : 0;
  }
};

template <class T, int kWidth>
struct HopperForward {
  using Shape = HopperShape<kWidth>;
  using P = TensorCores<T, 2>;
  static constexpr int kGroups = Shape::kGroups, kRows = Shape::kRows, kKeys = Shape::kKeys;
  static constexpr int kBuffers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  static constexpr bool kTurns = kWidth <= 128;  // wider products are long enough to hide the softmax of the other
  // numbers of barriers, those of the multiplying warpgroups in order
  static constexpr int kTurnBarrier = 1, kGroupBarrier = kTurnBarrier + kGroups;
  using QueryTile = BoxTile<kRows, kWidth>;
  using KeyTile = BoxTile<kKeys, kWidth>;
  static constexpr int kAlign = 1024;
  static constexpr size_t kSharedBytes =
      kAlign + QueryTile::kBytes + 2 * kBuffers * KeyTile::kBytes + (1 + 2 * kBuffers) * sizeof(Handover);
  static_assert(kSharedBytes <= size_t{227} << 10);

  const HopperForwardCall& given;
  const AttentionCall& call;
  const AttentionParams& p;
  const QueryTile q;
  char *const k, *const v;  // kBuffers tiles each
  Handover *const q_handover, *const k_handover, *const v_handover;

  static TFORMER_DEVICE void run(const HopperForwardCall& given, char* shared) {
    HopperForward(given, align_shared(shared, kAlign)).attend();
  }

  TFORMER_DEVICE HopperForward(const HopperForwardCall& given_, char* shared)
      : given(given_),
        call(given_.call),
        p(given_.call.p),
        q{shared},
        k(shared + QueryTile::kBytes),
        v(k + kBuffers * KeyTile::kBytes),
        q_handover(reinterpret_cast<Handover*>(v + kBuffers * KeyTile::kBytes)),
        k_handover(q_handover + 1),
        v_handover(k_handover + kBuffers) {}

  TFORMER_DEVICE void attend() const {
    if (thread_index() == 0) {
      for (int n = 0; n < 1 + 2 * kBuffers; ++n) {
        mbarrier_init(&q_handover[n].full, 1);
        mbarrier_init(&q_handover[n].empty, 4 * kGroups);  // each warp that multiplies
      }
      mbarrier_publish();
    }
    sync_block();
    if (thread_index() < kWarpgroup) {
      fewer_registers<Shape::kFetchRegisters>();
      if (warp() == 0) fetch_all();
    } else {
      more_registers<Shape::kRegisters>();
      multiply_all();
    }
  }

  // f(HopperTile) for each tile of queries of this block. By whole warps.
  template <class F>
  TFORMER_DEVICE void for_each_tile(F&& f) const {
#pragma unroll 1
    for (int index = static_cast<int>(block_index<0>()); index < call.grid.blocks();
         index += static_cast<int>(block_count<0>())) {
      Work work = work_of(call.grid, index);
      int64_t b = 0, h = work.head;
      if (call.packed) {
        if (!find_sequence(p.cu_seqlens_q, p.B, kRows, work.tile, b)) continue;
      } else {
        b = work.head / p.Hq, h = work.head % p.Hq;
      }
      f(HopperTile(call, b, h, work.tile, kRows, kKeys));
    }
  }

  // ---- The warp that fetches. ----

  TFORMER_DEVICE void fetch_all() const {
    int q_phase = 0, passed = 0;  // passed: tiles of keys before
    for_each_tile([&](const HopperTile& tile) {
      const int batch = call.packed ? 0 : tile.b, kv_head = tile.h / static_cast<int>(p.Hq / p.Hk);
      const Positions seq(sequence_of(p, tile.b));
      fetch(q, given.q, *q_handover, q_phase, seq.q_begin + tile.i0, tile.h, batch);
      q_phase ^= 1;
      const int first = seq.k_begin + tile.first_key0;
#pragma unroll 1
      for (int n = 0; n <= tile.count; ++n) {  // keys are wanted one tile ahead of the values
        if (n < tile.count) fetch_part(k, given.k, k_handover, passed + n, first + n * kKeys, kv_head, batch);
        if (n > 0) fetch_part(v, given.v, v_handover, passed + n - 1, first + (n - 1) * kKeys, kv_head, batch);
      }
      passed += tile.count;
    });
  }

  template <class Tile>
  static TFORMER_DEVICE void fetch(const Tile& to, const TensorMap& map, Handover& handover, int phase, int row,
                                   int head, int batch) {
    mbarrier_wait(&handover.empty, phase ^ 1);  // at first, the phase before the first
    if (lane() == 0) to.load(&map, row, head, batch, &handover.full);
    sync_warp();
  }
  static TFORMER_DEVICE void fetch_part(char* ring, const TensorMap& map, Handover* handover, int n, int row, int head,
                                        int batch) {
    fetch(buffer(ring, n), map, handover[buffer_of(n)], phase_of(n), row, head, batch);
  }
  static TFORMER_DEVICE KeyTile buffer(char* ring, int n) { return {ring + buffer_of(n) * KeyTile::kBytes}; }
  static TFORMER_DEVICE void wait_for_part(Handover* handover, int n) {
    mbarrier_wait(&handover[buffer_of(n)].full, phase_of(n));
  }

  // ---- Warps that multiply. ----

  static TFORMER_DEVICE int group() { return thread_index() / kWarpgroup - 1; }
  // First query of the warp.
  static TFORMER_DEVICE int first_row(const HopperTile& tile) { return tile.i0 + 64 * group() + 16 * (warp() % 4); }

  TFORMER_DEVICE void multiply_all() const {
    int q_phase = 0, passed = 0;
    for_each_tile([&](const HopperTile& tile) {
      mbarrier_wait(&q_handover->full, q_phase);
      multiply(tile, passed);
      q_phase ^= 1;
      passed += tile.count;
    });
  }

  // This warp has read what the buffer holds.
  static TFORMER_DEVICE void release(Handover& handover) {
    if (lane() == 0) mbarrier_arrive(&handover.empty);
    sync_warp();
  }

  // Turns go round: the first one is the first warpgroup's.
  TFORMER_DEVICE void give_turn_to(int other) const {
    if constexpr (kTurns) arrive_threads_of(kTurnBarrier + other, 2 * kWarpgroup);
  }
  TFORMER_DEVICE void wait_for_turn() const {
    if constexpr (kTurns) sync_threads_of(kTurnBarrier + group(), 2 * kWarpgroup);
  }

  TFORMER_DEVICE void multiply(const HopperTile& tile, int passed) const {
    const Scores<T, true> scores(p, sequence_of(p, tile.b), tile.b, tile.h);
    const int row0 = first_row(tile);
    const int all_begin = scores.range.begin(row0 + 15);  // what all queries of the warp see
    const int all_end = row0 + 16 <= scores.Sq ? scores.range.end(row0) : 0;
    float o[2][kWidth / 4], s[2][kKeys / 4], rescale[2];
    uint32_t weights[kKeys / 16][4];
    clear(o);
    OnlineSoftmax<T, 2, true> softmax;

    const auto weigh = [&](int n) {  // scores of tile n become weights
      const int key0 = tile.first_key0 + n * kKeys;
      if (key0 < all_begin || key0 + kKeys > all_end) {
        const Scores<T, true> anew(p, sequence_of(p, tile.b), tile.b, tile.h);
        finish_scores<P>(anew, s, tile.b, first_row(tile), key0, 0, anew.range.Sk);
      }
      return any(softmax.weigh(scores, s, rescale));
    };

    if (tile.count > 0) {
      wait_for_part(k_handover, passed);
      multiply_keys(s, passed);
      wgmma_wait<0>();
      hold(s);
      release(k_handover[buffer_of(passed)]);
      weigh(0);  // nothing is summed yet
      pack(weights, s);
      if (tile.count > 1 && group() == kGroups - 1) give_turn_to(0);
    }
#pragma unroll 1
    for (int n = 1; n < tile.count; ++n) {
      wait_for_part(k_handover, passed + n);
      wait_for_turn();
      multiply_keys(s, passed + n);
      wait_for_part(v_handover, passed + n - 1);
      multiply_values(o, weights, passed + n - 1);
      const bool last = n + 1 == tile.count && group() == kGroups - 1;
      if (!last) give_turn_to(group() == kGroups - 1 ? 0 : group() + 1);
      wgmma_wait<1>();
      hold(s);
      release(k_handover[buffer_of(passed + n)]);
      const bool grown = weigh(n);
      hold(s);
      // A loop of one pass: in a straight line ptxas takes the wait before the exponents, which are to run beside the
      // product.
      do {
        wgmma_wait<0>();
      } while (scores.unit < 0);
      hold(o);
      hold(weights);
      release(v_handover[buffer_of(passed + n - 1)]);
      if (grown) multiply_rows_by(o, rescale);
      pack(weights, s);
    }
    if (tile.count > 0) {
      const int last = passed + tile.count - 1;
      wait_for_part(v_handover, last);
      multiply_values(o, weights, last);
      wgmma_wait<0>();
      hold(o);
      hold(weights);
      release(v_handover[buffer_of(last)]);
    }
    finish(tile, o, softmax);
  }

  TFORMER_DEVICE void multiply_keys(float (&s)[2][kKeys / 4], int n) const {
    const uint64_t rows = q.by_rows(64 * group()), keys = buffer(k, n).by_rows(0);
    hold(s);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      Wgmma<T, kKeys>::shared(s, advance(rows, QueryTile::column_bytes(d)), advance(keys, KeyTile::column_bytes(d)),
                              d > 0);
    }
    wgmma_commit();
  }

  TFORMER_DEVICE void multiply_values(float (&o)[2][kWidth / 4], const uint32_t (&weights)[kKeys / 16][4],
                                      int n) const {
    constexpr int kColumns = smaller(kWidth, 128);  // of one product
    const uint64_t values = buffer(v, n).by_columns();
    hold(o);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const uint64_t from = advance(values, j * 16 * kBoxRowBytes);
      Wgmma<T, kColumns>::template registers<0>(o, weights[j], from, true);
      if constexpr (kWidth > kColumns) {
        const uint64_t right = advance(from, kColumns / kBoxColumns * KeyTile::kBoxBytes);
        Wgmma<T, kColumns>::template registers<kColumns / 4>(o, weights[j], right, true);
      }
    }
    wgmma_commit();
  }

  // Weights as the left operand, where they are: as in TensorCores::multiply_down.
  static TFORMER_DEVICE void pack(uint32_t (&weights)[kKeys / 16][4], const float (&s)[2][kKeys / 4]) {
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* pair = &s[e % 2][4 * j + e / 2 * 2];
        weights[j][e] = pack_two<T>(pair[0], pair[1]);
      }
    }
  }

  TFORMER_DEVICE void finish(const HopperTile& tile, float (&o)[2][kWidth / 4],
                             OnlineSoftmax<T, 2, true>& softmax) const {
    const Sequence sequence = sequence_of(p, tile.b);
    const Scores<T, true> scores(p, sequence, tile.b, tile.h);
    const Positions seq(sequence);
    const int row0 = first_row(tile);
    float* lse = static_cast<float*>(p.lse) + tile.b * p.lse_stride[0] + tile.h * p.lse_stride[1] + seq.q_begin;
    const bool has_sink = p.sinks != nullptr;
    const unsigned suspects =
        softmax.template finish_rows<P>(scores, o, row0, has_sink, has_sink ? sink_of<float>(p, tile.h) : 0.0f, 1.0f,
                                        [&](int i) -> float& { return lse[i]; });
    sync_threads_of(kGroupBarrier + group(), kWarpgroup);  // products of all four warps have read the queries
    P::put(o, q, row0 - tile.i0);
    store_rows(q, row0 - tile.i0, 16, row_at<T>(p.o, tile.b, tile.h, seq.q_begin + row0), p.o.stride[2], seq.Sq - row0,
               static_cast<int>(p.Dv), true);
    fence_async_proxy();  // the next queries come by the copy engine
    sync_warp();
    release(*q_handover);
#pragma unroll 1
    for (int n = 0; n < 16; ++n) {
      if (suspects >> n & 1) redo_row(tile, scores, seq, row0 + n);
    }
  }

  // As AttentionForward::redo_row.
  TFORMER_DEVICE void redo_row(const HopperTile& tile, const Scores<T, true>& scores, const Positions& seq,
                               int i) const {
    RowForward<T, true> row(scores, seq, tile.b, tile.h, i);
    for (int j = scores.range.begin(i); j < scores.range.end(i); ++j) row.add_key(j);
    if (p.sinks) row.add_weight(sink_of<float>(p, tile.h));
    row.store(row_at<T>(p.o, tile.b, tile.h, seq.q_begin + i));
  }
};

}  // namespace tformer::gpu
