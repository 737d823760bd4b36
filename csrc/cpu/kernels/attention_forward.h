// o = softmax(scores) v, row tiles of kTileRows queries against key ranges that fit in cache (online softmax between
// ranges: Milakov & Gimelshein 2018; tiling: Dao et al. 2022).
#pragma once

#include "online_softmax.h"
#include "scores.h"
#include "scratch.h"
#include "upcoming.h"

namespace tformer::TFORMER_ISA {
namespace {

constexpr int64_t kScoreBytes = 24 * 1024, kPackedBytes = 512 * 1024;

// Keys of one range: scores of a row tile within 24 KB of L1, packed keys and values within half of a 1 MB L2.
template <class P>
int64_t forward_range(const AttentionParams& p) {
  const int64_t size = sizeof(typename P::Real);
  const int64_t by_scores = kScoreBytes / (kTileRows * size);
  const int64_t by_packed = kPackedBytes * P::kStep / ((p.D + p.Dv) * size);
  const int64_t keys = (by_scores < by_packed ? by_scores : by_packed) / kKeyBlock * kKeyBlock;
  const int64_t all = round_up(p.Sk > 0 ? p.Sk : 1, kKeyBlock);
  return keys < kKeyBlock ? kKeyBlock : (keys < all ? keys : all);
}

template <class T>
struct AttentionForward {
  using P = Pack<T>;
  using Real = typename P::Real;
  using Group = typename P::Group;
  using State = OnlineSoftmax<T>;
  static constexpr int L = kLanes<Real>;

  const AttentionParams& p;
  const int64_t group, range_keys, q_groups, groups, out_columns;
  bool several_ranges;
  Group *keys, *values, *queries, *weights;
  Real *scores, *out;
  Real *row_m, *row_l;  // of the rows of a head, whose logarithms are taken together
  State* state;
  uint8_t *live, *hidden;
  size_t bytes;

  AttentionForward(const AttentionParams& params, const AttentionTask& t, Scratch scratch)
      : p(params),
        group(p.Hq / p.Hk),
        range_keys(forward_range<P>(p)),
        q_groups(row_groups<P>(p.D)),
        groups((p.D + P::kStep - 1) / P::kStep),
        out_columns(round_up(p.Dv, L)),
        several_ranges(p.Sk > range_keys) {
    const int64_t tiles = several_ranges ? group * ((t.q_end - t.q_begin + kTileRows - 1) / kTileRows) : 1;
    keys = scratch.take<Group>(range_keys * groups);
    values = scratch.take<Group>(range_keys / P::kStep * out_columns);
    queries = scratch.take<Group>(kTileRows * q_groups);
    scores = scratch.take<Real>(kTileRows * range_keys);
    weights = P::kStep == 1 ? reinterpret_cast<Group*>(scores) : scratch.take<Group>(kTileRows * range_keys / P::kStep);
    live = scratch.take<uint8_t>(range_keys / kPanel<P>);
    hidden = scratch.take<uint8_t>(kTileRows * range_keys);
    out = scratch.take<Real>(tiles * kTileRows * out_columns);
    row_m = scratch.take<Real>(round_up(t.q_end - t.q_begin, L));
    row_l = scratch.take<Real>(round_up(t.q_end - t.q_begin, L));
    state = scratch.take<State>(tiles);
    bytes = scratch.used();
  }

  void run(const AttentionTask& t) {
    for (int64_t b = t.b_begin; b < t.b_end; ++b) {
      const Sequence s = sequence_of(p, b);
      for (int64_t h = t.h_begin; h < t.h_end; h += group) {
        Upcoming<T> next;
        if (h + group < t.h_end) {
          expect(next, t, s, b, h + group);
        } else if (b + 1 < t.b_end) {
          expect(next, t, sequence_of(p, b + 1), b + 1, t.h_begin);
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

  template <class V>
  V* row_of(const Rows& r, int64_t b, int64_t h, int64_t i) const {
    return static_cast<V*>(r.data) + b * r.stride[0] + h * r.stride[1] + i * r.stride[2];
  }

  // Keys, values and first queries of the heads from h.
  void expect(Upcoming<T>& next, const AttentionTask& t, const Sequence& s, int64_t b, int64_t h) const {
    if (t.q_begin >= s.Sq) return;
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
      const int64_t left = clamp(k_end - key0, 0, range_keys), padded = round_up(left, L);
      const T* k = row_of<const T>(p.k, b, kv_head, s.k_begin + key0);
      const T* v = row_of<const T>(p.v, b, kv_head, s.k_begin + key0);
      pack_transposed<P>(k, p.k.stride[2], left, padded, p.D, keys);
      Finite<P> finite;
      pack_down_rows<P>(v, p.v.stride[2], left, padded, p.Dv, values, finite);
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
          const Span weighed = weigh_range(row_scores, s, at, key0, padded, finite.holds(), next);
          if (!last) {
            multiply_values(at, weighed, finite.holds(), nullptr);
          } else {
            finish_tile(s, at, weighed, finite.holds(), row_scores.pending_scale(), i - t.q_begin, t.k_begin);
          }
          next.fetch();
        }
        if (last && !p.part_keys) write_lse(s, b, h, t.q_begin, q_end - t.q_begin);
      }
    }
  }

  // Queries [i, i + rows) of head h, or query i of heads [h, h + rows), with their sums so far.
  struct Tile {
    int64_t b, h, i, rows;
    bool rows_are_heads;
    Real* o;
    State& state;

    int64_t head(int64_t r) const { return rows_are_heads ? h + r : h; }
    int64_t query(int64_t r) const { return rows_are_heads ? i : i + r; }
    int64_t last_query() const { return query(rows - 1); }
  };

  // The rows of the next tile arrive while this one is computed.
  void prefetch_queries(const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t q_end) const {
    const T* q = row_of<const T>(p.q, b, h, s.q_begin + i);
    for (int64_t r = 0; r < kTileRows && i + r < q_end; ++r) prefetch_row(q + r * p.q.stride[2], p.D);
  }

  // Keys of a range, from the first one of a panel on; a whole number of vectors.
  struct Span {
    int64_t begin, end;
  };

  // The weights of one row tile and the keys [key0, key0 + padded); of which keys there are any.
  Span weigh_range(const Scores<Real>& row_scores, const Sequence& s, const Tile& tile, int64_t key0, int64_t padded,
                   bool finite, Upcoming<T>& next) {
    const KeyRange& range = row_scores.range;
    // what some row of the tile sees by position, and what all of them see
    const int64_t seen = clamp(range.begin(tile.i) - key0, 0, padded);
    const int64_t seen_end = clamp(range.end(tile.last_query()) - key0, 0, padded);
    if (seen >= seen_end) return {0, 0};
    int64_t first = seen / kPanel<P>, last = panels(seen_end), fetches = 2 * panels(padded) + 1;
    for (int64_t n = first; n < last; ++n) live[n] = 1;
    if (row_scores.mask) leave_out_hidden(row_scores, tile, key0, first, last);
    if (first >= last) return {0, 0};
    // whole key blocks, so that rows start on a Philox block; of the last panel only vectors that a row sees a key of
    first = first * kPanel<P> / kKeyBlock * kKeyBlock / kPanel<P>;
    const int64_t begin = first * kPanel<P>, vectors = round_up(seen_end, L);
    const int64_t end = vectors < last * kPanel<P> ? vectors : last * kPanel<P>;
    const Product q_k = keys_product(s, tile);
    for (int64_t r = 0; r < tile.rows && !several_ranges; ++r) {
      fetch_row_to_write(row_of<const T>(p.o, tile.b, tile.head(r), s.q_begin + tile.query(r)), p.Dv);
    }
    Real rescale[kTileRows];
    for (int64_t r = 0; r < tile.rows; ++r) rescale[r] = 1;
    if (kTileColumns == 4 && row_scores.plain && finite && p.dropout_p == 0) {
      const int64_t all = range.begin(tile.last_query()) - key0, all_end = range.end(tile.i) - key0;
      for (int64_t j = begin; j < end; j += kPanel<P>) {
        const int64_t to = j + kPanel<P> < end ? j + kPanel<P> : end;
        if (fetches-- > 0) next.fetch();
        typename State::Bounds bounds;
        const bool edge = j < all || to > all_end;
        if (edge) {
          bounds.begins = j<all, bounds.ends = to> all_end;
          for (int64_t r = 0; r < tile.rows; ++r) {
            bounds.begin[r] = static_cast<Real>(range.begin(tile.query(r)) - key0 - j);
            bounds.end[r] = static_cast<Real>(range.end(tile.query(r)) - key0 - j);
          }
        }
        if (!weigh_panel(tile, q_k, edge ? &bounds : nullptr, j, to, row_scores.pending_scale())) {
          add_keys(row_scores, tile, q_k, key0, begin, j, to, finite, rescale);
        }
        if (fetches-- > 0) next.fetch();
      }
    } else {
      add_keys(row_scores, tile, q_k, key0, begin, begin, end, finite, rescale);
    }
    for (; fetches > 1; --fetches) next.fetch();
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (!tile.state.empty && rescale[r] != 1) scale_row(tile.o + r * out_columns, rescale[r]);
    }
    return {begin, end};
  }

  // Panels of [first, last) that the mask hides from all rows of the tile.
  void leave_out_hidden(const Scores<Real>& row_scores, const Tile& tile, int64_t key0, int64_t& first,
                        int64_t& last) const {
    const int64_t from = first, to = last;
    first = to, last = from;
    for (int64_t n = from; n < to; ++n) {
      const int64_t j = key0 + n * kPanel<P>;
      live[n] = row_scores.any_visible(tile.i, tile.last_query() + 1, j, j + kPanel<P>);
      if (live[n]) {
        first = n < first ? n : first;
        last = n + 1;
      }
    }
  }

  using Product = ProductOperands<P>;
  using Results = IntoRows<P, T>;
  static int64_t panels(int64_t n) { return (n + kPanel<P> - 1) / kPanel<P>; }
  static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

  // q.k of a tile, but for the panel of keys.
  Product keys_product(const Sequence& s, const Tile& tile) const {
    const T* q = row_of<const T>(p.q, tile.b, tile.h, s.q_begin + tile.i);
    const int64_t stride = tile.rows_are_heads ? p.q.stride[1] : p.q.stride[2];
    Product m{queries, q_groups, 1, nullptr, kPanel<P>, groups};
    if (in_place<P, T>(p.D, stride)) {
      m.a = reinterpret_cast<const Group*>(q), m.a_row = stride / P::kStep;
    } else {
      pack_along_row<P>(q, stride, tile.rows, tile.rows, p.D, queries, Unseen{});
    }
    return m;
  }

  // The weights of keys [j, to) of the range, at most one panel, without scores in memory; false where that is no way.
  bool weigh_panel(const Tile& tile, const Product& m, const typename State::Bounds* seen, int64_t j, int64_t to,
                   Real scale) const {
    if constexpr (kTileColumns == 4) {
      switch ((to - j) / L) {
        case 1:
          return weigh_columns<1>(tile, m, seen, j, scale);
        case 2:
          return weigh_columns<2>(tile, m, seen, j, scale);
        case 3:
          return weigh_columns<3>(tile, m, seen, j, scale);
        default:
          return weigh_columns<4>(tile, m, seen, j, scale);
      }
    }
    return false;
  }

  template <int kColumns>
  bool weigh_columns(const Tile& tile, const Product& m, const typename State::Bounds* seen, int64_t j,
                     Real scale) const {
    const Group* panel = keys + j * groups;
    Group* w = weights + j / P::kStep;
    const int64_t w_row = range_keys / P::kStep;
    switch (tile.rows) {
      case 1:
        return tile.state.template weigh_tile<1, kColumns>(m, panel, seen, scale, w, w_row);
      case 2:
        return tile.state.template weigh_tile<2, kColumns>(m, panel, seen, scale, w, w_row);
      case 3:
        return tile.state.template weigh_tile<3, kColumns>(m, panel, seen, scale, w, w_row);
      case 4:
        return tile.state.template weigh_tile<4, kColumns>(m, panel, seen, scale, w, w_row);
      case 5:
        return tile.state.template weigh_tile<5, kColumns>(m, panel, seen, scale, w, w_row);
      default:
        return tile.state.template weigh_tile<kTileRows, kColumns>(m, panel, seen, scale, w, w_row);
    }
  }

  // Keys [from, to) of the range by way of the scores in memory; those from `begin` on already have weights.
  void add_keys(const Scores<Real>& row_scores, const Tile& tile, const Product& q_k, int64_t key0, int64_t begin,
                int64_t from, int64_t to, bool finite, Real* rescale) {
    multiply_keys(q_k, tile.rows, from, to);
    const int64_t n = to - from;
    const Real scale = row_scores.pending_scale();
    Vec<Real> top[kTileRows];
    for (int64_t r = 0; r < tile.rows; ++r) {
      Real* row = scores + r * range_keys + from;
      row_scores.finish_row(row, tile.query(r), key0 + from, n, nullptr);
      top[r] = State::largest(row, n);
      if (!finite) {
        for (int64_t j = 0; j < n; ++j) hidden[r * range_keys + from + j] = row[j] == -kInfinity<Real>;
      }
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const Real factor = tile.state.raise(r, top[r], scale);
      if (factor == 1) continue;
      rescale[r] *= factor;
      Group* w = weights + r * range_keys / P::kStep;
      for (int64_t j = begin / P::kStep; j < from / P::kStep; j += L) store(w + j, P::scaled(load(w + j), factor));
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      Real* row = scores + r * range_keys + from;
      Group* row_weights = weights + (r * range_keys + from) / P::kStep;
      tile.state.weigh(r, row, n, scale, p.dropout_p > 0 ? nullptr : row_weights);
      if (p.dropout_p > 0) {
        drop_row(row, tile.b, tile.head(r), tile.query(r), key0 + from, n);
        narrow_along_row<P>(row, n, row_weights);
      }
    }
  }

  void multiply_keys(Product m, int64_t rows, int64_t from, int64_t to) const {
    for (int64_t n = from / kPanel<P>; n * kPanel<P> < to; ++n) {
      const int64_t columns = to - n * kPanel<P> < kPanel<P> ? to - n * kPanel<P> : kPanel<P>;
      const IntoSums<P> panel{scores + n * kPanel<P>, range_keys, false};
      m.b = keys + n * groups * kPanel<P>;
      if (live[n]) {
        product<P>(m, rows, columns, panel);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < columns; ++j) panel.c[r * range_keys + j] = -kInfinity<Real>;
        }
      }
    }
  }

  // Adds the weighted values to the tile's sums; or, where `results` are asked for, writes all of the sums there.
  void multiply_values(const Tile& tile, const Span& span, bool finite, const Results* results) const {
    constexpr int64_t kSumPanels = 256 / kPanel<P>;  // keys in one running sum
    const int64_t last = panels(span.end);
    for (int64_t n = span.begin / kPanel<P>; n < last;) {
      int64_t run = n + 1;
      while (run < last && live[run] == live[n] && run % kSumPanels != 0) ++run;
      if (live[n]) {
        const int64_t j = n * kPanel<P>, stop = run * kPanel<P> < span.end ? run * kPanel<P> : span.end;
        const Product m{
            weights + j / P::kStep, range_keys / P::kStep, 1, values + j / P::kStep * out_columns, out_columns,
            (stop - j) / P::kStep};
        const IntoSums<P> sums{tile.o, out_columns, !tile.state.empty};
        if (!finite) {
          product_without_hidden<P>(m, tile.rows, out_columns, sums, hidden + j, range_keys, 1);
        } else if (results && run == last) {
          *results->progress = tile.state.empty ? kLast : kLast | kSums;
          product<P>(m, tile.rows, out_columns, *results);
        } else {
          product<P>(m, tile.rows, out_columns, sums);
        }
        tile.state.empty = false;
      }
      n = run;
    }
  }

  void scale_row(Real* o, Real by) const {
    for (int64_t d = 0; d < out_columns; d += L) store(o + d, load(o + d) * by);
  }

  void drop_row(Real* row, int64_t b, int64_t h, int64_t i, int64_t key, int64_t n) const {
    const Dropout dropout(p.dropout_p, p.dropout_seed);
    const DropoutRow counter{static_cast<uint32_t>(i), static_cast<uint32_t>(h), static_cast<uint32_t>(b)};
    alignas(64) Real factor[kPhiloxBlock];
    for (int64_t j = 0; j < n; j += kPhiloxBlock) {
      const int64_t count = n - j < kPhiloxBlock ? n - j : kPhiloxBlock;
      dropout.factors(counter, key + j, count, factor);
      for (int64_t c = 0; c < count; ++c) row[j + c] *= factor[c];
    }
  }

  // The last keys of a tile: o / l; a row without a visible key is 0. `at`: place of the tile among the task's rows.
  void finish_tile(const Sequence& s, const Tile& tile, const Span& span, bool finite, Real scale, int64_t at,
                   int64_t k_begin) const {
    Real m[kTileRows], l[kTileRows], factor[kTileRows];
    for (int64_t r = 0; r < tile.rows; ++r) m[r] = tile.state.m[r] * scale, l[r] = sum_lanes<Real>(tile.state.l[r]);
    if (p.part_keys) {
      multiply_values(tile, span, finite, nullptr);
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
    uint8_t progress;
    const int64_t row = tile.rows_are_heads ? p.o.stride[1] : p.o.stride[2];
    const Results results{tile.o, out_columns, &progress, rows, row, p.Dv, factor};
    const bool direct = finite && span.begin < span.end;
    multiply_values(tile, span, finite, direct ? &results : nullptr);
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
