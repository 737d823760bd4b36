// Gradients of attention_forward.h from the saved log-sum-exp (Dao et al. 2022, section 3.1 and appendix B):
//   p = exp(score - lse), dv = pT do, dp = do vT, ds = p (dp - delta), dq = scale ds k, dk = scale dsT q.
// Blocks of keys outermost, blocks of queries inside, both ascending. A task may cover any rectangle and may leave out
// dq, or dk and dv: every sum still runs in the same order, so the split over threads does not show in a single bit.
#pragma once

#include "attention_gradient_rows.h"

namespace tformer::TFORMER_ISA {
namespace {

// rowsum(do * o) of one row.
template <class T>
TFORMER_INLINE double row_product(const T* go, const T* o, int64_t width) {
  using Real = typename Pack<T>::Real;
  constexpr int L = kLanes<Real>;
  Vec<Real> acc{};
  for (int64_t d = 0; d < width; d += L) {
    acc += width - d >= L ? load_as<Real>(o + d) * load_as<Real>(go + d)
                          : load_as<Real>(o + d, width - d) * load_as<Real>(go + d, width - d);
  }
  return static_cast<double>(sum_lanes<Real>(acc));
}

template <class T, class P>
class AttentionBackward : AttentionGradientRows<T, P> {
  using Base = AttentionGradientRows<T, P>;
  using typename Base::BlockRows;
  using Real = typename P::Real;
  using Group = typename P::Group;
  using Base::delta, Base::ds_along, Base::ds_down, Base::hidden, Base::lse, Base::p_down;
  using Base::dp, Base::p, Base::s;
  using Base::kQueries, Base::kKeys, Base::kRowsAtATime, Base::kAlong, Base::kDown;
  static constexpr int L = kLanes<Real>, kTileRows = P::kTileRows, kSlices = P::kSlices;
  // Row tiles of the sums over a block.
  static constexpr int64_t kQueryTiles = kQueries / kTileRows, kKeyTiles = (kKeys + kTileRows - 1) / kTileRows;

  const int64_t group;                 // query heads of a key head
  const int64_t groups, v_groups;      // steps of a sum over D, over Dv
  const int64_t q_columns, v_columns;  // D and Dv in whole vectors
  const int64_t q_row, v_row;          // groups of a packed row of q, of do
  int64_t q_count, k_count;            // padded rows and keys of the task

  // Operands by the letters of the formulas; _t: transposed panels, _down: summed down the rows.
  Group *k_t, *v_t, *k_down, *q_along, *do_along, *q_down, *do_down;
  ProductOperands<P> q_k, do_v;  // but for the keys; q and do along the row: packed, or the caller's own
  Real *dq, *dk, *dv;            // in tile registers dk and dv are transposed, each block of keys for itself
  Real* row_tile;                // of dk or dv, on its way to memory
  uint8_t* q_finite;
  uint8_t *dq_progress, *dkv_progress;  // of the row tiles of dq, and of dk and of dv
  Upcoming<T> next;

 public:
  size_t bytes;

  AttentionBackward(const AttentionParams& params, const AttentionTask& t, Scratch scratch)
      : Base(params, scratch, round_up(t.q_end - t.q_begin, kUnit<P>)),
        group(p.Hq / p.Hk),
        groups(sum_groups<P>(p.D)),
        v_groups(sum_groups<P>(p.Dv)),
        q_columns(round_up(p.D, L)),
        v_columns(round_up(p.Dv, L)),
        q_row(row_groups<P>(p.D)),
        v_row(row_groups<P>(p.Dv)),
        q_count(round_up(t.q_end - t.q_begin, kUnit<P>)),
        k_count(round_up(t.k_end - t.k_begin, kKeys)) {
    k_t = scratch.take<Group>(kKeys * kSlices * groups);
    v_t = scratch.take<Group>(kKeys * kSlices * v_groups);
    k_down = scratch.take<Group>(kKeys / P::kStep * kSlices * q_columns);
    q_along = scratch.take<Group>(q_count * kSlices * q_row);
    do_along = scratch.take<Group>(q_count * kSlices * v_row);
    q_down = P::kStep == 1 ? q_along : scratch.take<Group>(q_count / P::kStep * kSlices * q_columns);
    do_down = P::kStep == 1 ? do_along : scratch.take<Group>(q_count / P::kStep * kSlices * v_columns);
    dq = t.want_dq ? scratch.take<Real>(q_count * q_columns) : nullptr;
    dk = t.want_dkv ? scratch.take<Real>(k_count * q_columns) : nullptr;
    dv = t.want_dkv ? scratch.take<Real>(k_count * v_columns) : nullptr;
    q_finite = scratch.take<uint8_t>(q_count / kQueries + 1);
    row_tile = P::kTiles ? scratch.take<Real>(kTileRows * (q_columns > v_columns ? q_columns : v_columns)) : nullptr;
    dq_progress = scratch.take<uint8_t>(dq_tiles());
    dkv_progress = scratch.take<uint8_t>(dkv_tiles());
    bytes = scratch.used();
  }

  void run(const AttentionTask& t, const NextTask& then) {
    const typename P::Setup setup;
    for (int64_t b = t.b_begin; b < t.b_end; ++b) {
      const Sequence seq = sequence_of(p, b);
      for (int64_t h = t.h_begin; h < t.h_end; ++h) {
        if (h == t.h_begin || h % group == 0) std::memset(dkv_progress, kNothing, static_cast<size_t>(dkv_tiles()));
        next = Upcoming<T>();
        expect_keys(t, seq, b, h, kKeys, seq.Sk);
        if (h + 1 < t.h_end) {
          expect(t, seq, b, h + 1);
        } else if (b + 1 < t.b_end) {
          expect(t, sequence_of(p, b + 1), b + 1, t.h_begin);
        } else if (const AttentionTask* task = is_short(t) ? then.take() : nullptr) {
          expect(*task, sequence_of(p, task->b_begin), task->b_begin, task->h_begin);
        }
        const bool last = h + 1 == t.h_end || (h + 1) % group == 0;  // of those that share dk and dv
        run_head(t, seq, b, h, last);
        if (t.want_dkv && last) write_dkv(t, b, h / group, seq);
      }
    }
  }

 private:
  int64_t dq_tiles() const { return (q_count / kQueries + 1) * kQueryTiles; }
  int64_t dkv_tiles() const { return 2 * k_count / kKeys * kKeyTiles; }

  // Whether what a head reads at its beginning is worth fetching early, and a task worth taking early for it.
  bool is_short(const AttentionTask& t) const {
    return Upcoming<T>::fits((t.q_end - t.q_begin) * (p.D + 2 * p.Dv) + kKeys * (p.D + p.Dv));
  }

  // What head h reads at its beginning.
  void expect(const AttentionTask& t, const Sequence& seq, int64_t b, int64_t h) {
    if (!is_short(t)) return;
    const int64_t count = (t.q_end < seq.Sq ? t.q_end : seq.Sq) - t.q_begin, q0 = seq.q_begin + t.q_begin;
    next.add(row_of<const T>(p.q, b, h, q0), p.q.stride[2], count, p.D);
    next.add(row_of<const T>(p.grad_o, b, h, q0), p.grad_o.stride[2], count, p.Dv);
    next.add(row_of<const T>(p.o, b, h, q0), p.o.stride[2], count, p.Dv);
    expect_keys(t, seq, b, h, 0, kKeys);
  }

  // Its keys [from, to) of those of the task.
  void expect_keys(const AttentionTask& t, const Sequence& seq, int64_t b, int64_t h, int64_t from, int64_t to) {
    const int64_t end = t.k_end < seq.Sk ? t.k_end : seq.Sk, begin = t.k_begin + from;
    const int64_t count = (t.k_begin + to < end ? t.k_begin + to : end) - begin, k0 = seq.k_begin + begin;
    next.add(row_of<const T>(p.k, b, h / group, k0), p.k.stride[2], count, p.D);
    next.add(row_of<const T>(p.v, b, h / group, k0), p.v.stride[2], count, p.Dv);
  }

  void run_head(const AttentionTask& t, const Sequence& seq, int64_t b, int64_t h, bool last_head) {
    const int64_t q_end = t.q_end < seq.Sq ? t.q_end : seq.Sq;
    const int64_t k_end = t.k_end < seq.Sk ? t.k_end : seq.Sk;
    if (t.q_begin >= q_end) return;
    const Scores<Real> scores(p, seq, b, h);
    next.spread_over(register_tiles(t, scores.range, q_end, k_end));
    pack_queries(seq, b, h, t.q_begin, q_end, t.want_dkv);
    std::memset(dq_progress, kNothing, static_cast<size_t>(dq_tiles()));
    for (int64_t key0 = t.k_begin; key0 < k_end; key0 += kKeys) {
      const Keys keys{b, h, key0, k_end - key0 < kKeys ? k_end - key0 : kKeys, key0 + kKeys >= k_end};
      int64_t block = next_block(scores, keys, t.q_begin, q_end);
      if (block >= q_end) continue;
      const bool k_finite = pack_keys(seq, keys);
      while (block < q_end) {
        int64_t i = block, i_end = q_end - block < kQueries ? q_end : block + kQueries;
        // row tiles at either end that position alone hides; at the beginning in whole units of sums over rows
        constexpr int64_t kHidden = kTileRows % kUnit<P> == 0 ? kTileRows : 2 * kTileRows;
        while (scores.range.end(i + kHidden - 1) <= key0) i += kHidden;
        int64_t tile = i + (i_end - i - 1) / kTileRows * kTileRows;
        for (; tile > i && scores.range.begin(tile) >= key0 + keys.count; tile -= kTileRows) i_end = tile;
        const bool finite = k_finite && q_finite[(block - t.q_begin) / kQueries];
        block = next_block(scores, keys, block + kQueries, q_end);
        run_block(t, seq, scores, keys, i, i_end - i, finite, last_head && block >= q_end);
      }
    }
    if (!t.want_dq) return;
    for (int64_t i = 0; i < q_end - t.q_begin; i += kTileRows) {  // what later keys would have been added to
      const int64_t rows = q_end - t.q_begin - i < kTileRows ? q_end - t.q_begin - i : kTileRows;
      write(dq_progress[i / kTileRows], dq + i * q_columns, q_columns, p.grad_q, b, h, seq.q_begin + t.q_begin + i,
            rows, rows, p.D);
    }
  }

  // Of the products of a head, as far as position alone shows.
  int64_t register_tiles(const AttentionTask& t, const KeyRange& range, int64_t q_end, int64_t k_end) const {
    const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    constexpr int64_t kStrip = P::kTileColumns * L;
    const int64_t strips = parts(q_columns, kStrip), v_strips = parts(v_columns, kStrip);
    int64_t count = 0;
    for (int64_t key0 = t.k_begin; key0 < k_end; key0 += kKeys) {
      const int64_t keys = k_end - key0 < kKeys ? k_end - key0 : kKeys, first = range.query_begin(key0);
      const int64_t rows = range.query_end(key0 + keys - 1, q_end) - (first > t.q_begin ? first : t.q_begin);
      if (rows <= 0) continue;
      count += parts(rows, kTileRows) * 2 * parts(keys, kPanel<P>);
      if (t.want_dq) count += parts(rows, kTileRows) * strips;
      if (t.want_dkv) count += parts(rows, kQueries) * parts(keys, kTileRows) * (strips + v_strips);
    }
    return count;
  }

  // A block of keys and a query head.
  struct Keys {
    int64_t b, h, begin, count;
    bool last;  // of the head
  };

  // The first block of queries from `block` on of which some may attend to some of the keys.
  int64_t next_block(const Scores<Real>& scores, const Keys& keys, int64_t block, int64_t q_end) const {
    while (block < q_end && !scores.any_visible(block, block + kQueries < q_end ? block + kQueries : q_end, keys.begin,
                                                keys.begin + keys.count)) {
      block += kQueries;
    }
    return block;
  }

  // Rows that are read in place where they are groups as they stand, packed otherwise.
  void pack_queries(const Sequence& seq, int64_t b, int64_t h, int64_t i0, int64_t i1, bool want_dkv) {
    const T* q = row_of<const T>(p.q, b, h, seq.q_begin + i0);
    const T* go = row_of<const T>(p.grad_o, b, h, seq.q_begin + i0);
    const int64_t q_stride = p.q.stride[2], go_stride = p.grad_o.stride[2];
    q_k = packed_product<P>(q_along, q_row, nullptr, kPanel<P>, groups, groups);
    do_v = packed_product<P>(do_along, v_row, nullptr, kPanel<P>, v_groups, v_groups);
    const bool q_as_is = P::kStep == 2 && in_place<P, T>(p.D, q_stride, i1 - i0);
    const bool do_as_is = P::kStep == 2 && in_place<P, T>(p.Dv, go_stride, i1 - i0);
    if (q_as_is) q_k.take_rows(reinterpret_cast<const Group*>(q), q_stride / P::kStep);
    if (do_as_is) do_v.take_rows(reinterpret_cast<const Group*>(go), go_stride / P::kStep);
    for (int64_t i = 0; i < i1 - i0; i += kQueries) {
      const int64_t count = i1 - i0 - i < kQueries ? i1 - i0 - i : kQueries, padded = round_up(count, kUnit<P>);
      const T *q_rows = q + i * q_stride, *go_rows = go + i * go_stride;
      Finite<P> finite;
      pack_down_rows<P>(q_rows, q_stride, count, padded, p.D,
                        q_down + place_down<P>(i / P::kStep, 0, q_columns, q_count / P::kStep), q_count / P::kStep,
                        finite);
      pack_down_rows<P>(go_rows, go_stride, count, padded, p.Dv,
                        do_down + place_down<P>(i / P::kStep, 0, v_columns, q_count / P::kStep), q_count / P::kStep,
                        finite);
      q_finite[i / kQueries] = finite.holds();
      if (P::kStep == 2 && !q_as_is) {
        pack_along_row<P>(q_rows, q_stride, count, padded, p.D, q_along + place_along<P>(i, 0, q_row), Unseen{});
      }
      if (P::kStep == 2 && !do_as_is) {
        pack_along_row<P>(go_rows, go_stride, count, padded, p.Dv, do_along + place_along<P>(i, 0, v_row), Unseen{});
      }
    }
    if (P::kTiles && want_dkv) {
      transpose_tiles<P>(q_down, q_columns, q_count / P::kStep);
      transpose_tiles<P>(do_down, v_columns, q_count / P::kStep);
    }
    const T* o = row_of<const T>(p.o, b, h, seq.q_begin + i0);
    const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + seq.q_begin + i0;
    for (int64_t i = 0; i < i1 - i0; ++i) {
      const Real x = static_cast<const Real*>(p.lse)[at + i];
      const bool dead = x == -kInfinity<Real>;
      lse[i] = dead ? Real(0) : x;  // a dead row has only -inf scores
      const double dlse = p.grad_lse && !dead ? static_cast<const Real*>(p.grad_lse)[at + i] : Real(0);
      delta[i] = static_cast<Real>(row_product<T>(go + i * go_stride, o + i * p.o.stride[2], p.Dv) - dlse);
    }
  }

  bool pack_keys(const Sequence& seq, const Keys& keys) {
    const T* k = row_of<const T>(p.k, keys.b, keys.h / group, seq.k_begin + keys.begin);
    const T* v = row_of<const T>(p.v, keys.b, keys.h / group, seq.k_begin + keys.begin);
    const int64_t padded = round_up(keys.count, kColumnUnit<P>);
    Finite<P> finite;
    pack_transposed<P>(k, p.k.stride[2], keys.count, padded, p.D, k_t, Unseen{});
    FiniteSlices<P> values_finite;
    pack_transposed<P>(v, p.v.stride[2], keys.count, padded, p.Dv, v_t, values_finite);
    pack_down_rows<P>(k, p.k.stride[2], keys.count, padded, p.D, k_down, kKeys / P::kStep, finite);
    return finite.holds() && values_finite.holds();
  }

  // One kQueries x kKeys block: the five products. What position alone hides from all rows, or all keys, of a
  // register tile is left out of them. `last_rows`: no more is added to the gradients of these keys.
  void run_block(const AttentionTask& t, const Sequence& seq, const Scores<Real>& scores, const Keys& block, int64_t i,
                 int64_t rows, bool finite, bool last_rows) {
    const int64_t b = block.b, h = block.h, key0 = block.begin, keys = block.count;
    const int64_t at = i - t.q_begin, padded = round_up(rows, kUnit<P>);
    const int64_t width = round_up(keys, kColumnUnit<P>);
    const KeyRange range = scores.range.from_key(key0);
    Steps seen[kQueryTiles];  // keys of each row tile, in whole units
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t last = i + (r + kTileRows < rows ? r + kTileRows : rows) - 1;
      const int64_t end = round_up(range.end(last), kColumnUnit<P>);
      seen[r / kTileRows] = {range.begin(i + r) / kColumnUnit<P> * kColumnUnit<P>, end < width ? end : width};
    }
    const BlockRows block_rows{b, h, i, rows, at, key0, keys, width, finite};
    const auto rows_end = [&](int64_t first) { return first + kRowsAtATime < rows ? first + kRowsAtATime : rows; };
    const auto alone = []() TFORMER_LAMBDA {};
    if (P::kTiles) multiply_keys(at, 0, rows_end(0), width, seen, finite, alone);
    for (int64_t first = 0; first < padded; first += kRowsAtATime) {
      const int64_t end = first + kRowsAtATime < padded ? first + kRowsAtATime : padded;
      int64_t left = first;
      if constexpr (P::kTiles) {  // beside the products of the next rows
        const int64_t after = first + kRowsAtATime;
        const int64_t products =
            kSlices > 1 && after < rows ? keys_products(rows_end(after) - after, seen[after / kTileRows]) : 0;
        typename Base::RowPairs pairs(*this, scores, block_rows, first, rows_end(first), seen[first / kTileRows],
                                      products);
        if (after < rows) multiply_keys(at, after, rows_end(after), width, seen, finite, pairs);
        left = pairs.finish();
      } else {
        multiply_keys(at, first, rows_end(first), width, seen, finite, alone);
        if constexpr (P::kStep == 2) {
          for (int64_t r = first; r < rows_end(first) && r == left; r += kTileRows) {
            const int64_t tile_end = r + kTileRows < rows ? r + kTileRows : rows;
            left = typename Base::RowPairs(*this, scores, block_rows, r, tile_end, seen[r / kTileRows], 0).finish();
          }
        }
      }
      this->differentiate(t, scores, block_rows, left, end, seen);
    }
    if (t.want_dkv) {
      const int64_t key = key0 - t.k_begin, row_steps = padded / P::kStep;
      const auto rows_of = [&](int64_t j) TFORMER_LAMBDA {  // that see a key of the key tile from j
        const int64_t last = (j + kTileRows < keys ? j + kTileRows : keys) - 1;
        const int64_t first = range.query_begin(j) - i, end = range.query_end(last, i + rows) - i;
        return Steps{(first > 0 ? first : 0) / kUnit<P> * P::kSumUnit, sum_groups<P>(end)};
      };
      uint8_t* progress = dkv_progress + 2 * key / kKeys * kKeyTiles;
      const int64_t steps = q_count / P::kStep, pair = at / P::kStep;
      if constexpr (P::kTiles) {
        const auto add = [&](const Group* rows_t, const Group* weights, int64_t columns, Real* sums, uint8_t* have) {
          const auto m =
              packed_product<P>(rows_t + place_along<P>(0, pair, steps), steps, weights, kKeys, kDown, row_steps);
          add_transposed(m, columns, width, sums + key * columns, have, rows_of, finite);
        };
        add(do_down, p_down, v_columns, dv, progress);
        add(q_down, ds_down, q_columns, dk, progress + kKeyTiles);
      } else {
        for (int64_t n = 0; n < 2 * kKeyTiles && last_rows; ++n) progress[n] |= kLast;
        const auto add = [&](const Group* weights, const Group* rows, int64_t columns, Real* sums, uint8_t* have,
                             const Rows& to, int64_t to_width) {
          const Gradient into{sums + key * columns, columns,  have,    row_of<T>(to, b, h / group, seq.k_begin + key0),
                              to.stride[2],         to_width, nullptr, true};
          rows += place_down<P>(pair, 0, columns, steps);
          multiply({weights, 1, kKeys, rows, columns, row_steps}, keys, columns, into, rows_of, finite,
                   {hidden, 1, kKeys, 0});
        };
        add(p_down, do_down, v_columns, dv, progress, p.grad_v, p.Dv);
        add(ds_down, q_down, q_columns, dk, progress + kKeyTiles, p.grad_k, p.D);
      }
    }
    if (t.want_dq) {
      const auto keys_of = [&](int64_t r) TFORMER_LAMBDA {
        return Steps{seen[r / kTileRows].begin / P::kStep, seen[r / kTileRows].end / P::kStep};
      };
      uint8_t* progress = dq_progress + at / kTileRows;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t last = i + (r + kTileRows < rows ? r + kTileRows : rows) - 1;
        const bool met_again = progress[r / kTileRows] & kWritten;  // a hidden one, beside one that is not
        if (!met_again && (block.last || range.end(last) <= kKeys)) progress[r / kTileRows] |= kLast;
      }
      const auto d_query = Gradient::kept(dq + at * q_columns, q_columns, progress,
                                          row_of<T>(p.grad_q, b, h, seq.q_begin + i), p.grad_q.stride[2], p.D);
      multiply(packed_product<P>(ds_along, kAlong, k_down, q_columns, kKeys / P::kStep, width / P::kStep), rows,
               q_columns, d_query, keys_of, finite, {hidden, kKeys, 1, 0});
    }
  }

  // The products with keys of the rows [first, end) of a block: s and dp.
  template <class Beside>
  void multiply_keys(int64_t at, int64_t first, int64_t end, int64_t width, const Steps* seen, bool finite,
                     Beside&& beside) {
    for (int64_t n = 0; n < width; n += kPanel<P>) {
      const auto panel = [&](ProductOperands<P> m, const Group* transposed, Real* c) {
        m.a = m.a_at(at + first, 0), m.b = transposed + panel_place<P>(n, m.steps);
        const IntoSums<P> into{c, kKeys, false};
        for (int64_t r = first; r < end; r += kTileRows) {
          const Steps& all = seen[r / kTileRows];
          const int64_t from = all.begin > n ? all.begin : n, to = all.end < n + kPanel<P> ? all.end : n + kPanel<P>;
          if (from >= to) continue;
          const Group *a = m.a_at(r - first, 0), *b = m.b_at(0, from - n);
          if (kSlices > 1 && !finite) {
            ProductOperands<P> tile = m;
            tile.a = a, tile.b = b;
            const IntoSums<P> rows_of_tile{c + (r - first) * kKeys + from, kKeys, false};
            product_without_hidden<P>(tile, end - r < kTileRows ? end - r : kTileRows, to - from, rows_of_tile,
                                      Hidden{});
            continue;
          }
          const int64_t tile_rows = end - r < kTileRows ? end - r : kTileRows;
          const int columns = static_cast<int>((to - from) / L);
          if constexpr (P::kTiles) {
            tile_product(tile_rows, columns, m, into, beside, a, b, m.steps, r - first, from);
          } else {
            register_tile_rows<P>(tile_rows, columns, m, into, a, b, m.steps, r - first, from);
          }
          next.fetch();
        }
      };
      panel(q_k, k_t, s + Base::scores_place(first));
      panel(do_v, v_t, dp + Base::scores_place(first));
    }
  }

  // Instructions of them, in tile registers.
  int64_t keys_products(int64_t rows, const Steps& seen) const {
    if (seen.begin >= seen.end) return 0;
    return (rows > L ? 2 : 1) * (seen.end - seen.begin) / L * (groups + v_groups) / P::kSumUnit *
           Terms<kSlices>::kCount;
  }

  using Gradient = IntoRows<P, T>;

  template <class StepsOf>
  void multiply(const ProductOperands<P>& m, int64_t rows, int64_t columns, const Gradient& into, StepsOf&& steps_of,
                bool finite, const Hidden& terms) {
    if (finite) {
      product<P>(m, rows, columns, into, steps_of, [&]() TFORMER_LAMBDA { next.fetch(); });
    } else {
      product_without_hidden<P>(m, rows, columns, into, terms);
    }
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Steps sum = steps_of(r);
      into.advance(r, !finite || sum.begin < sum.end);
    }
  }

  // Adds the product to the transposed sums of a block of keys, key tile by key tile.
  template <class StepsOf>
  void add_transposed(const ProductOperands<P>& m, int64_t rows, int64_t width, Real* sums, uint8_t* progress,
                      StepsOf&& steps_of, bool finite) {
    for (int64_t j = 0; j < width; j += kTileRows, ++progress) {
      const Steps sum = finite ? steps_of(j) : Steps{0, m.steps};
      if (sum.begin >= sum.end) continue;
      const auto into = IntoSums<P>::kept(sums, kKeys, *progress == kSums);
      for (int64_t d = 0; d < rows; d += kTileRows) {
        const int64_t count = rows - d < kTileRows ? rows - d : kTileRows;
        if (finite) {
          register_tile_rows<P>(count, 2, m, into, m.a_at(d, sum.begin), m.b_at(sum.begin, j), sum.end - sum.begin, d,
                                j);
          next.fetch();
        } else {
          ProductOperands<P> tile = m;
          tile.a = m.a_at(d, 0), tile.b = m.b_at(0, j);
          IntoSums<P> tile_sums = into;
          tile_sums.c += sums_place<P>(d, j, kKeys);
          product_without_hidden<P>(tile, count, kTileRows, tile_sums, {hidden + j, 0, kKeys, 1});
        }
      }
      *progress = kSums;
    }
  }

  void write_dkv(const AttentionTask& t, int64_t b, int64_t kv_head, const Sequence& seq) const {
    const int64_t length = p.cu_seqlens_k ? seq.Sk : p.Sk;  // keys past key_lengths get zeros
    const int64_t k_end = t.k_end < length ? t.k_end : length;
    const int64_t seen_end = t.k_end < seq.Sk ? t.k_end : seq.Sk;
    for (int64_t key0 = t.k_begin; key0 < k_end; key0 += kKeys) {
      for (int64_t j = 0; j < kKeys && key0 + j < k_end; j += kTileRows) {
        const int64_t key = key0 - t.k_begin + j, in_block = kKeys - j < kTileRows ? kKeys - j : kTileRows;
        const int64_t rows = k_end - key0 - j < in_block ? k_end - key0 - j : in_block, seen = seen_end - key0 - j;
        const uint8_t* progress = dkv_progress + 2 * (key0 - t.k_begin) / kKeys * kKeyTiles + j / kTileRows;
        const auto write_tile = [&](uint8_t have, const Real* block, int64_t columns, const Rows& to, int64_t width) {
          const Real* sums = block + j * columns;
          if (P::kTiles && have != kNothing) {
            for (int64_t r = 0; r < kTileRows; r += L) {
              for (int64_t d = 0; d < columns; d += L) {
                transpose_to<Real>(block + sums_place<P>(d, j + r, kKeys), kTileSide,
                                   row_tile + sums_place<P>(r, d, columns), kTileSide);
              }
            }
            sums = row_tile;
          }
          write(have, sums, columns, to, b, kv_head, seq.k_begin + key0 + j, rows, seen, width);
        };
        write_tile(progress[0], dv + (key - j) * v_columns, v_columns, p.grad_v, p.Dv);
        write_tile(progress[kKeyTiles], dk + (key - j) * q_columns, q_columns, p.grad_k, p.D);
      }
    }
  }

  // What products have not written of the row tile from `row`: sums; zeros where there are none, or from row `seen` on.
  void write(uint8_t progress, const Real* sums, int64_t columns, const Rows& to, int64_t b, int64_t h, int64_t row,
             int64_t rows, int64_t seen, int64_t width) const {
    for (int64_t i = 0; i < rows; ++i) {
      const bool zeros = i >= seen || progress == kNothing;
      if (progress == kWritten && !zeros) continue;
      store_row<Real>(row_of<T>(to, b, h, row + i), width, [&](int64_t d) TFORMER_LAMBDA {
        return zeros ? Vec<Real>{} : load(sums + sums_place<P>(i, d, columns));
      });
    }
  }
};

// The gradient of the sink logit of one (batch, head): the sum over its rows of p_sink (dlse - rowsum(do * o)).
template <class T>
double attention_sink_gradient(const AttentionParams& p, int64_t b, int64_t h) {
  using Real = typename Pack<T>::Real;
  const Sequence seq = sequence_of(p, b);
  const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + seq.q_begin;
  const Real logit = sink_of<Real>(p, h);
  const auto row_of = [&](const Rows& r, int64_t i) {
    return static_cast<const T*>(r.data) + b * r.stride[0] + h * r.stride[1] + (seq.q_begin + i) * r.stride[2];
  };
  double sum = 0;
  for (int64_t i = 0; i < seq.Sq; ++i) {
    const Real lse = static_cast<const Real*>(p.lse)[at + i];
    if (lse == -kInfinity<Real>) continue;
    const double dlse = p.grad_lse ? static_cast<const Real*>(p.grad_lse)[at + i] : Real(0);
    const double product = row_product<T>(row_of(p.grad_o, i), row_of(p.o, i), p.Dv);
    sum += __builtin_exp(static_cast<double>(logit - lse)) * (dlse - product);
  }
  return sum;
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
