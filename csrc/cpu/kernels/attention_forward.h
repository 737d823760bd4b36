// o = softmax(scores) v, row tiles of kTileRows queries against key ranges that fit in cache (online softmax between
// ranges: Milakov & Gimelshein 2018; tiling: Dao et al. 2022).
#pragma once

#include "attention_tiles_beside.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class T, class P>
class AttentionForward : AttentionTilesBeside<T, P> {
  using Base = AttentionTilesBeside<T, P>;
  using typename Base::Product, typename Base::Results, typename Base::Span, typename Base::State, typename Base::Tile;
  using Real = typename P::Real;
  static constexpr int L = kLanes<Real>, kTileRows = P::kTileRows;
  using Base::clamp, Base::panels;
  using Base::keys, Base::values, Base::out_columns, Base::p, Base::range_keys;

  const int64_t group;
  bool several_ranges;
  Real* out;
  Real *row_m, *row_l;  // of the rows of a head, whose logarithms are taken together
  State* state;

 public:
  size_t bytes;

  AttentionForward(const AttentionParams& params, const AttentionTask& t, Scratch scratch)
      : Base(params, scratch), group(p.Hq / p.Hk), several_ranges(p.Sk > range_keys) {
    const int64_t tiles = several_ranges ? group * ((t.q_end - t.q_begin + kTileRows - 1) / kTileRows) : 1;
    out = scratch.take<Real>(tiles * kTileRows * out_columns);
    row_m = scratch.take<Real>(round_up(t.q_end - t.q_begin, L));
    row_l = scratch.take<Real>(round_up(t.q_end - t.q_begin, L));
    state = scratch.take<State>(tiles);
    bytes = scratch.used();
  }

  void run(const AttentionTask& t, const NextTask& then) {
    const typename P::Setup setup;
    for (int64_t b = t.b_begin; b < t.b_end; ++b) {
      const Sequence s = sequence_of(p, b);
      for (int64_t h = t.h_begin; h < t.h_end; h += group) {
        Upcoming<T> next;
        if (h + group < t.h_end) {
          expect(next, t, s, b, h + group);
        } else if (b + 1 < t.b_end) {
          expect(next, t, sequence_of(p, b + 1), b + 1, t.h_begin);
        } else if (const AttentionTask* task = is_short(s) ? then.take() : nullptr) {
          expect(next, *task, sequence_of(p, task->b_begin), task->b_begin, task->h_begin);
        }
        run_group(t, s, b, h, next);
      }
    }
  }

  // The rows of a task from the parts of their keys, which tasks of their own have computed, in order.
  void merge(const AttentionTask& t) {
    for (int64_t b = t.b_begin; b < t.b_end; ++b) {
      const Sequence s = sequence_of(p, b);
      for (int64_t h = t.h_begin; h < t.h_end; ++h) {
        for (int64_t i = 0; i < s.Sq; ++i) merge_row(s, b, h, i);
        write_lse(s, b, h, 0, s.Sq);
      }
    }
  }

 private:
  void merge_row(const Sequence& s, int64_t b, int64_t h, int64_t i) {
    const int64_t parts = (p.Sk + p.part_keys - 1) / p.part_keys;
    Real m = -kInfinity<Real>, l = 0;
    for (int64_t n = 0; n < parts; ++n) {
      const Real part_m = part_of(n, b, h, i)[p.Dv];
      m = part_m > m ? part_m : m;
    }
    for (int64_t d = 0; d < out_columns; d += L) store(out + d, Vec<Real>{});
    for (int64_t n = 0; n < parts; ++n) {
      const Real* part = part_of(n, b, h, i);
      if (part[p.Dv + 1] == 0) continue;
      const Real factor = exp_vec<Real>(splat(part[p.Dv] - m))[0];
      for (int64_t d = 0; d < p.Dv; ++d) out[d] += part[d] * factor;
      l += part[p.Dv + 1] * factor;
    }
    const Real factor = factor_of_row(h, m, l);
    write_row(row_of<T>(p.o, b, h, s.q_begin + i), out, l, factor);
    row_m[i] = m, row_l[i] = l;
  }

  // Whether the rows of a head are worth fetching early, and a task worth taking early for it.
  bool is_short(const Sequence& s) const { return !p.part_keys && Upcoming<T>::fits(s.Sk * (p.D + p.Dv)); }

  // Keys, values and first queries of the heads from h.
  void expect(Upcoming<T>& next, const AttentionTask& t, const Sequence& s, int64_t b, int64_t h) const {
    if (t.q_begin >= s.Sq || !is_short(s)) return;
    const int64_t rows = s.Sq - t.q_begin < kTileRows ? s.Sq - t.q_begin : kTileRows;
    next.add(row_of<const T>(p.k, b, h / group, s.k_begin), p.k.stride[2], s.Sk, p.D);
    next.add(row_of<const T>(p.v, b, h / group, s.k_begin), p.v.stride[2], s.Sk, p.Dv);
    next.add(row_of<const T>(p.q, b, h, s.q_begin + t.q_begin), p.q.stride[2], rows, p.D);
  }

  // The query heads that share a key head share its packed keys and values.
  void run_group(const AttentionTask& t, const Sequence& s, int64_t b, int64_t h_begin, Upcoming<T>& next) {
    const int64_t q_end = t.q_end < s.Sq ? t.q_end : s.Sq;
    if (t.q_begin >= q_end) return;
    const int64_t kv_head = h_begin / group;
    next.spread_over(group * ((q_end - t.q_begin + kTileRows - 1) / kTileRows) *
                     (2 * panels(p.Sk < range_keys ? p.Sk : range_keys) + 1));
    // whole ranges of keys that no row sees by position are left out
    const KeyRange range(p, s);
    const int64_t k_end = clamp(s.Sk, 0, t.k_end), seen_end = clamp(range.end(q_end - 1), 0, k_end);
    int64_t key0 = t.k_begin;
    while (key0 + range_keys < seen_end && key0 + range_keys <= range.begin(t.q_begin)) key0 += range_keys;
    for (bool first = true, last = false; !last; first = false, key0 += range_keys) {
      const int64_t left = clamp(k_end - key0, 0, range_keys), padded = round_up(left, kColumnUnit<P>);
      const T* k = row_of<const T>(p.k, b, kv_head, s.k_begin + key0);
      const T* v = row_of<const T>(p.v, b, kv_head, s.k_begin + key0);
      const bool few_rows = p.part_keys && group * p.Sq <= kTileRows;
      this->keys_present = left;
      this->keys_in_place = Base::kReadsKeys && few_rows ? k : nullptr;
      // rows that lie apart come too slowly from memory for what zipping two of them saves
      const bool pays = P::kStep == 1 || p.v.stride[2] == p.Dv;
      this->values_in_place = Base::kReadsValues && few_rows && pays && p.Dv % (P::kStep * L) == 0 ? v : nullptr;
      if (!this->keys_in_place) pack_transposed<P>(k, p.k.stride[2], left, padded, p.D, keys, this->finite_keys = {});
      Finite<P> finite;
      if constexpr (Base::kReadsValues) {
        if (this->values_in_place) see_rows<P>(v, p.v.stride[2], left, p.Dv, finite);
        if (P::kStep > 1 && !finite.holds()) this->values_in_place = nullptr;  // packed for products term by term
      }
      if (!this->values_in_place) {
        pack_down_rows<P>(v, p.v.stride[2], left, padded, p.Dv, values, range_keys / P::kStep, finite);
      }
      last = key0 + range_keys >= seen_end;
      int64_t tile = 0;
      // one query of each head, and nothing that differs between heads: they are the rows of a tile
      const bool rows_are_heads = p.part_keys && p.Sq == 1 && Scores<Real>(p, s, b, h_begin).plain && p.dropout_p == 0;
      for (int64_t h = h_begin; h < h_begin + group; h += rows_are_heads ? kTileRows : 1) {
        const Scores<Real> row_scores(p, s, b, h);
        for (int64_t i = t.q_begin; i < q_end; i += kTileRows, tile += several_ranges) {
          const int64_t rows = clamp(rows_are_heads ? h_begin + group - h : q_end - i, 1, kTileRows);
          const Tile at{b, h, i, rows, rows_are_heads, out + tile * kTileRows * out_columns, state[tile]};
          if (i + kTileRows < q_end) prefetch_queries(s, b, h, i + kTileRows, q_end);
          if (first) at.state.start();
          const Product q_k = this->keys_product(s, at);
          Span rest = this->seen_keys(row_scores, at, key0, padded);
          for (int64_t r = 0; r < rows && !several_ranges; ++r) {
            fetch_row_to_write(row_of<const T>(p.o, at.b, at.head(r), s.q_begin + at.query(r)), p.Dv);
          }
          if constexpr (P::kTiles) {
            rest = this->weigh_beside(row_scores, at, q_k, key0, rest, finite.holds(), next);
          } else {
            this->weigh(row_scores, at, q_k, key0, rest, 2 * panels(padded) + 1, finite.holds(), next);
          }
          if (!last && P::kTiles && finite.holds()) {
            this->wait(at, rest);
          } else if (!last) {
            this->multiply_values(at, rest, finite.holds(), nullptr);
          } else {
            finish_tile(s, at, rest, finite.holds(), row_scores.pending_scale(), i - t.q_begin, t.k_begin);
          }
          next.fetch();
        }
        keep_tiles_awake<P>();
        if (last && !p.part_keys) write_lse(s, b, h, t.q_begin, q_end - t.q_begin);
      }
      this->add_waiting();
    }
  }

  // The rows of the next tile arrive while this one is computed.
  TFORMER_INLINE void prefetch_queries(const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t q_end) const {
    const T* q = row_of<const T>(p.q, b, h, s.q_begin + i);
    for (int64_t r = 0; r < kTileRows && i + r < q_end; ++r) prefetch_row(q + r * p.q.stride[2], p.D);
  }

  // The last keys of a tile: o / l; a row without a visible key is 0. `at`: place of the tile among the task's rows.
  void finish_tile(const Sequence& s, const Tile& tile, const Span& span, bool finite, Real scale, int64_t at,
                   int64_t k_begin) {
    Real m[kTileRows], l[kTileRows], factor[kTileRows];
    for (int64_t r = 0; r < tile.rows; ++r) m[r] = tile.state.origin(r, scale), l[r] = sum_lanes<Real>(tile.state.l[r]);
    if (p.part_keys) {
      this->multiply_values(tile, span, finite, nullptr);
      for (int64_t r = 0; r < tile.rows; ++r) {
        write_part(part_of(k_begin / p.part_keys, tile.b, tile.head(r), tile.query(r)),
                   tile.state.empty ? nullptr : tile.o + r * out_columns, m[r], l[r]);
      }
      return;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      factor[r] = factor_of_row(tile.head(r), m[r], l[r]);
      row_m[at + r] = m[r], row_l[at + r] = l[r];
    }
    T* rows = row_of<T>(p.o, tile.b, tile.h, s.q_begin + tile.i);
    const int64_t row = tile.rows_are_heads ? p.o.stride[1] : p.o.stride[2];
    const bool direct = finite && span.begin < span.end;
    if (P::kTiles && direct) return this->wait(tile, span, factor, rows, row);
    uint8_t progress;
    const Results results{tile.o, out_columns, &progress, rows, row, p.Dv, factor};
    this->multiply_values(tile, span, finite, direct ? &results : nullptr);
    if (direct) return;
    for (int64_t r = 0; r < tile.rows; ++r) write_row(rows + r * row, tile.o + r * out_columns, l[r], factor[r]);
  }

  // What the sums of a row are multiplied with in the end; m and l get the sink. 0 if the row saw no key.
  Real factor_of_row(int64_t h, Real& m, Real& l) const {
    if (l == 0) return 0;
    const Real share = p.sinks ? add_sink(sink_of<Real>(p, h), m, l) : Real(1);
    return share / l;
  }

  // The sums of a row that saw no key may be anything.
  void write_row(T* to, const Real* sums, Real l, Real factor) const {
    store_row<Real>(to, p.Dv, [&](int64_t d) TFORMER_LAMBDA { return l == 0 ? Vec<Real>{} : load(sums + d) * factor; });
  }

  // A row of one part of the keys: o before the division, m, l.
  Real* part_of(int64_t part, int64_t b, int64_t h, int64_t i) const {
    return static_cast<Real*>(p.parts) + (((part * p.B + b) * p.Hq + h) * p.Sq + i) * (p.Dv + 2);
  }

  void write_part(Real* to, const Real* o, Real m, Real l) const {
    store_row<Real>(to, p.Dv, [&](int64_t d) TFORMER_LAMBDA { return o ? load(o + d) : Vec<Real>{}; });
    to[p.Dv] = m, to[p.Dv + 1] = l;
  }

  // The log-sum-exp of the rows from i; -inf for a row without a visible key.
  void write_lse(const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t rows) const {
    Real* lse = static_cast<Real*>(p.lse) + b * p.lse_stride[0] + h * p.lse_stride[1] + s.q_begin + i;
    for (int64_t r = 0; r < rows; r += L) {
      const Vec<Real> l = load(row_l + r);
      const Vec<Real> x = (l == 0) ? splat(-kInfinity<Real>) : load(row_m + r) + log_vec<Real>(l);
      if (rows - r >= L) {
        store(lse + r, x);
      } else {
        store_as<Real>(lse + r, x, rows - r);
      }
    }
  }

  // One more score x that has no value: m and l with it; returns the multiplier of what was summed before.
  static Real add_sink(Real x, Real& m, Real& l) {
    const Real m_new = x > m ? x : m;
    const Real rescale = m == m_new ? Real(1) : exp_vec<Real>(splat(m - m_new))[0];
    l = l * rescale + (x == -kInfinity<Real> ? Real(0) : exp_vec<Real>(splat(x - m_new))[0]);
    m = m_new;
    return rescale;
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
