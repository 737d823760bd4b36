// o = softmax(scores) v on sm_90a, for calls of 16-bit elements that attention_choice.h lets through: the algorithm of
// ../attention_forward.h, spread over warpgroups (Shah et al. 2024, FlashAttention-3). A block stays and takes one tile
// of queries after another. One warp finds out which, and has the copy engine fetch it and its keys and values, two
// tiles of each, while the tile before is still worked on; the other warpgroups each multiply 64 queries with them. The
// product of a tile's keys runs beside that of the values before, and its softmax while the latter goes on. Three
// warpgroups take turns in handing out products, so that one multiplies while another exponentiates.
#pragma once

#include <gpu/hopper.h>

#include "../attention_rows.h"
#include "../attention_work.h"
#include "attention_bias.h"
#include "attention_launch.h"
#include "box_tile.h"

namespace tformer::gpu {

// Registers of a thread: o, kWidth / 2; scores, kKeys / 2; weights, kKeys / 4. Shared memory: two tiles of queries (one
// above width 128), two of keys, two of values, up to 224 KB. Dropout wants whole blocks of its counters; a bias takes
// kKeys / 4 registers more.
template <int kWidth, HopperExtra kExtra>
struct HopperShape {
  static constexpr bool kNone = kExtra == HopperExtra::none;
  static constexpr int kGroups = kWidth == 64 && kNone ? 3 : 2;  // warpgroups that multiply
  static constexpr int kKeys = !kNone ? (kWidth <= 128 ? 128 : 64) : kWidth == 256 ? 80 : kWidth == 128 ? 128 : 112;
  static constexpr int kRows = hopper_forward_queries(kWidth, kExtra);
  static_assert(kExtra != HopperExtra::dropout || kKeys % kPhiloxBlock == 0);
  static_assert(kRows == 64 * kGroups);
  // of the 168 (three groups: 128) each that a block is launched with; the fetching warpgroup gives up what others need
  static constexpr int kFetchRegisters = kGroups == 2 ? 24 : 32, kRegisters = kGroups == 2 ? 240 : 160;
  static_assert(kFetchRegisters + kGroups * kRegisters <= (1 + kGroups) * (kGroups == 2 ? 168 : 128));
};

// A tile of queries, and the tiles of the keys that some of them see. What follows from these is made anew where it is
// wanted: registers are short.
struct HopperTile {
  static constexpr int kNone = -1;  // as count: there are no more tiles
  int b, h, i0;
  int first_key0, count;

  static TFORMER_DEVICE HopperTile of(const AttentionCall& call, int64_t b, int64_t h, int64_t tile, int rows,
                                      int keys) {
    const int i0 = static_cast<int>(tile) * rows;
    const Sequence seq = sequence_of(call.p, static_cast<int>(b));
    const KeyRangeOf<int> range(call.p, seq);
    const int key_begin = range.begin(i0), key_end = range.end(smaller(i0 + rows, static_cast<int>(seq.Sq)) - 1);
    const int first_key0 = key_begin / keys * keys;
    return {static_cast<int>(b), static_cast<int>(h), i0, first_key0,
            key_end > key_begin ? (key_end - first_key0 + keys - 1) / keys : 0};
  }
  // The same for all lanes, and known to be: descriptors made of it need no vector registers.
  TFORMER_DEVICE HopperTile uniform() const {
    return {shuffle_index(b, 0), shuffle_index(h, 0), shuffle_index(i0, 0), shuffle_index(first_key0, 0),
            shuffle_index(count, 0)};
  }
};

template <class T, int kWidth, HopperExtra kExtra>
struct HopperForward {
  using Shape = HopperShape<kWidth, kExtra>;
  static constexpr bool kDropout = kExtra == HopperExtra::dropout, kBias = kExtra == HopperExtra::bias;
  using FinalScores = Scores<T, !kBias>;  // of which weights are made
  using P = TensorCores<T, 2>;
  static constexpr int kGroups = Shape::kGroups, kRows = Shape::kRows, kKeys = Shape::kKeys;
  static constexpr int kBuffers = 2, kQueryBuffers = kWidth > 128 ? 1 : 2;
  static constexpr int kThreads = kWarpgroup * (1 + kGroups);
  static constexpr bool kTurns = kGroups == 3;  // two warpgroups do as well without
  // numbers of barriers, those of the multiplying warpgroups in order
  static constexpr int kTurnBarrier = 1, kGroupBarrier = kTurnBarrier + kGroups;
  using QueryTile = BoxTile<kRows, kWidth>;
  using KeyTile = BoxTile<kKeys, kWidth>;
  static constexpr int kAlign = 1024;
  static constexpr int kHandovers = kQueryBuffers + 2 * kBuffers;
  static constexpr size_t kSharedBytes = kAlign + kQueryBuffers * QueryTile::kBytes + 2 * kBuffers * KeyTile::kBytes +
                                         kHandovers * sizeof(Handover) + kQueryBuffers * sizeof(HopperTile);
  static_assert(kSharedBytes <= size_t{227} << 10);

  const HopperForwardCall& given;
  const AttentionCall& call;
  const AttentionParams& p;
  char *const q, *const k, *const v;  // kQueryBuffers tiles, kBuffers each
  Handover *const q_handover, *const k_handover, *const v_handover;
  HopperTile* const tiles;  // beside the queries

  static TFORMER_DEVICE void run(const HopperForwardCall& given, char* shared) {
    HopperForward(given, align_shared(shared, kAlign)).attend();
  }

  TFORMER_DEVICE HopperForward(const HopperForwardCall& given_, char* shared)
      : given(given_),
        call(given_.call),
        p(given_.call.p),
        q(shared),
        k(q + kQueryBuffers * QueryTile::kBytes),
        v(k + kBuffers * KeyTile::kBytes),
        q_handover(reinterpret_cast<Handover*>(v + kBuffers * KeyTile::kBytes)),
        k_handover(q_handover + kQueryBuffers),
        v_handover(k_handover + kBuffers),
        tiles(reinterpret_cast<HopperTile*>(v_handover + kBuffers)) {}

  TFORMER_DEVICE void attend() const {
    if (thread_index() == 0) {
      for (int n = 0; n < kHandovers; ++n) {
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

  // Queries lie in a ring of kQueryBuffers.
  static constexpr int query_buffer_of(int n) { return kQueryBuffers == 1 ? 0 : buffer_of(n); }
  static constexpr int query_phase_of(int n) { return kQueryBuffers == 1 ? n & 1 : phase_of(n); }
  TFORMER_DEVICE QueryTile query_tile(int n) const { return {q + query_buffer_of(n) * QueryTile::kBytes}; }

  // ---- The warp that fetches. ----

  TFORMER_DEVICE void fetch_all() const {
    int count = 0, passed = 0;  // tiles of queries, of keys before
#pragma unroll 1
    for (int index = static_cast<int>(block_index<0>()); index < call.grid.blocks(); index = next(index)) {
      Work work = work_of(call.grid, index);
      int64_t b = 0, h = work.head;
      if (call.packed) {
        if (!find_sequence(p.cu_seqlens_q, p.B, kRows, work.tile, b)) continue;
      } else {
        b = work.head / p.Hq, h = work.head % p.Hq;
      }
      const HopperTile tile = HopperTile::of(call, b, h, work.tile, kRows, kKeys);
      const int batch = call.packed ? 0 : tile.b, kv_head = tile.h / static_cast<int>(p.Hq / p.Hk);
      const Positions seq(sequence_of(p, tile.b));
      Handover& handover = q_handover[query_buffer_of(count)];
      mbarrier_wait(&handover.empty, query_phase_of(count) ^ 1);  // at first, the phase before the first
      if (lane() == 0) {
        tiles[query_buffer_of(count)] = tile;
        query_tile(count).load(&given.q, seq.q_begin + tile.i0, tile.h, batch, &handover.full);
      }
      sync_warp();
      const int first = seq.k_begin + tile.first_key0;
#pragma unroll 1
      for (int n = 0; n <= tile.count; ++n) {  // keys are wanted one tile ahead of the values
        if (n < tile.count) fetch(k, given.k, k_handover, passed + n, first + n * kKeys, kv_head, batch);
        if (n > 0) fetch(v, given.v, v_handover, passed + n - 1, first + (n - 1) * kKeys, kv_head, batch);
      }
      ++count, passed += tile.count;
    }
    Handover& handover = q_handover[query_buffer_of(count)];
    mbarrier_wait(&handover.empty, query_phase_of(count) ^ 1);
    if (lane() == 0) {
      tiles[query_buffer_of(count)].count = HopperTile::kNone;
      mbarrier_arrive(&handover.full);
    }
  }

  // The number of the tile after this one. Tiles that differ in length go to whoever asks first, a ticket at a time.
  TFORMER_DEVICE int next(int index) const {
    const int blocks = static_cast<int>(block_count<0>());
    return given.ticket ? blocks + shuffle_index(lane() == 0 ? take_ticket(given.ticket) : 0, 0) : index + blocks;
  }

  static TFORMER_DEVICE void fetch(char* ring, const TensorMap& map, Handover* handovers, int n, int row, int head,
                                   int batch) {
    Handover& handover = handovers[buffer_of(n)];
    mbarrier_wait(&handover.empty, phase_of(n) ^ 1);
    if (lane() == 0) buffer(ring, n).load(&map, row, head, batch, &handover.full);
    sync_warp();
  }
  static TFORMER_DEVICE KeyTile buffer(char* ring, int n) { return {ring + buffer_of(n) * KeyTile::kBytes}; }
  static TFORMER_DEVICE void wait_for_part(Handover* handover, int n) {
    mbarrier_wait(&handover[buffer_of(n)].full, phase_of(n));
  }

  // ---- Warps that multiply. ----

  static TFORMER_DEVICE int group() { return shuffle_index(thread_index() / kWarpgroup, 0) - 1; }
  // First query of the warp.
  static TFORMER_DEVICE int first_row(const HopperTile& tile) { return tile.i0 + 64 * group() + 16 * (warp() % 4); }

  TFORMER_DEVICE void multiply_all() const {
    int passed = 0;
#pragma unroll 1
    for (int count = 0;; ++count) {
      mbarrier_wait(&q_handover[query_buffer_of(count)].full, query_phase_of(count));
      const HopperTile tile = tiles[query_buffer_of(count)].uniform();
      if (tile.count == HopperTile::kNone) return;
      multiply(tile, query_tile(count), passed);
      release(q_handover[query_buffer_of(count)]);
      passed += tile.count;
    }
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

  TFORMER_DEVICE void multiply(const HopperTile& tile, const QueryTile& queries, int passed) const {
    const FinalScores scores(p, sequence_of(p, tile.b), tile.b, tile.h);
    const int row0 = first_row(tile);
    const int all_begin = scores.range.begin(row0 + 15);  // what all queries of the warp see
    const int all_end = row0 + 16 <= scores.Sq ? scores.range.end(row0) : 0;
    float o[2][kWidth / 4], s[2][kKeys / 4], rescale[2];
    uint32_t weights[kKeys / 16][4];
    clear(o);
    OnlineSoftmax<T, 2, !kBias> softmax;
    BiasTile<T, kBias ? kKeys : 8> bias;

    const auto read_bias = [&](int n) {
      if constexpr (kBias) bias.read(p, tile.b, tile.h, first_row(tile), tile.first_key0 + n * kKeys);
    };
    const auto weigh = [&](int n) {  // scores of tile n become weights
      const int key0 = tile.first_key0 + n * kKeys;
      if constexpr (kBias) bias.add_to(s, scores.scale);
      if (key0 < all_begin || key0 + kKeys > all_end) {
        const Scores<T, true> anew(p, sequence_of(p, tile.b), tile.b, tile.h);
        finish_scores<P>(anew, s, tile.b, first_row(tile), key0, 0, anew.range.Sk);
      }
      hide_keys<P>(scores, s, key0);
      const bool grown = any(softmax.weigh(scores, s, rescale));
      if constexpr (kDropout) drop(s, tile, key0);
      return grown;
    };

    if (tile.count > 0) {
      read_bias(0);
      wait_for_part(k_handover, passed);
      multiply_keys(s, queries, passed);
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
      multiply_keys(s, queries, passed + n);
      wait_for_part(v_handover, passed + n - 1);
      multiply_values(o, weights, passed + n - 1);
      const bool last = n + 1 == tile.count && group() == kGroups - 1;
      if (!last) give_turn_to(group() == kGroups - 1 ? 0 : group() + 1);
      read_bias(n);  // beside both products
      wgmma_wait<1>();
      hold(s);
      release(k_handover[buffer_of(passed + n)]);
      const bool grown = weigh(n);
      hold(s);
      // A loop of one pass: in a straight line ptxas takes the wait before the exponents, which are to run beside the
      // product.
      do {
        wgmma_wait<0>();
      } while ((kBias ? scores.scale : scores.unit) < 0);
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
    finish(tile, queries, o, softmax);
  }

  // Weights that are dropped become 0, in the sums of rows they stay. Of 64 keys a lane holds those that counters t and
  // 4 + t serve, t = lane % 4, and no others: philox.h.
  TFORMER_DEVICE void drop(float (&s)[2][kKeys / 4], const HopperTile& tile, int key0) const {
    const auto seed = static_cast<uint64_t>(*given.dropout.seed);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < kKeys / 32; ++n) {  // a counter each
        const int block = n / 2, half = n % 2;
        const auto at = static_cast<uint32_t>((key0 / kKeepBlock + block) * static_cast<int>(kPhiloxCounters) +
                                              4 * half + lane() % 4);
        const PhiloxWords random = philox(at, static_cast<uint32_t>(first_row(tile) + P::row(r)),
                                          static_cast<uint32_t>(tile.h), static_cast<uint32_t>(tile.b), seed);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& x = s[r][2 * (8 * block + 2 * (e / 2) + half) + e % 2];
          x = random.is_kept(e / 2, e % 2, given.dropout.drop_below) ? x : 0.0f;
        }
      }
    }
  }

  TFORMER_DEVICE void multiply_keys(float (&s)[2][kKeys / 4], const QueryTile& queries, int n) const {
    const uint64_t rows = queries.by_rows(64 * group()), keys = buffer(k, n).by_rows(0);
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
    constexpr int kColumns = smaller(kWidth, 128), kRight = kWidth - kColumns;  // of one product
    const uint64_t values = buffer(v, n).by_columns();
    hold(o);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const uint64_t from = advance(values, j * 16 * kBoxRowBytes);
      Wgmma<T, kColumns>::template registers<0>(o, weights[j], from, true);
      if constexpr (kRight > 0) {
        const uint64_t right = advance(from, kColumns / kBoxColumns * KeyTile::kBoxBytes);
        Wgmma<T, kRight>::template registers<kColumns / 4>(o, weights[j], right, true);
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

  // The results leave through where the queries lay.
  TFORMER_DEVICE void finish(const HopperTile& tile, const QueryTile& queries, float (&o)[2][kWidth / 4],
                             OnlineSoftmax<T, 2, !kBias>& softmax) const {
    const Sequence sequence = sequence_of(p, tile.b);
    const FinalScores scores(p, sequence, tile.b, tile.h);
    const Positions seq(sequence);
    const int row0 = first_row(tile);
    float* lse = static_cast<float*>(p.lse) + tile.b * p.lse_stride[0] + tile.h * p.lse_stride[1] + seq.q_begin;
    const bool has_sink = p.sinks != nullptr;
    const unsigned suspects = softmax.template finish_rows<P>(
        scores, o, row0, has_sink, has_sink ? sink_of<float>(p, tile.h) : 0.0f,
        kDropout ? static_cast<float>(given.dropout.scale) : 1.0f, [&](int i) -> float& { return lse[i]; });
    sync_threads_of(kGroupBarrier + group(), kWarpgroup);  // products of all four warps have read the queries
    P::put(o, queries, row0 - tile.i0);
    store_rows(queries, row0 - tile.i0, 16, row_at<T>(p.o, tile.b, tile.h, seq.q_begin + row0), p.o.stride[2],
               seq.Sq - row0, static_cast<int>(p.Dv), true);
    fence_async_proxy();  // the next queries come by the copy engine
    sync_warp();
#pragma unroll 1
    for (int n = 0; n < 16; ++n) {
      if (suspects >> n & 1) redo_row(tile, scores, seq, row0 + n);
    }
  }

  // As AttentionForward::redo_row.
  TFORMER_DEVICE void redo_row(const HopperTile& tile, const FinalScores& scores, const Positions& seq, int i) const {
    RowForward<T, !kBias> row(scores, seq, tile.b, tile.h, i);
    for (int j = scores.range.begin(i); j < scores.range.end(i); ++j) row.add_key(j);
    if (p.sinks) row.add_weight(sink_of<float>(p, tile.h));
    row.store(row_at<T>(p.o, tile.b, tile.h, seq.q_begin + i));
  }
};

}  // namespace tformer::gpu
