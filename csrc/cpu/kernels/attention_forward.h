// o = softmax(scores) v, row tiles of kTileRows queries against key ranges that fit in cache (online softmax between
// ranges: Milakov & Gimelshein 2018; tiling: Dao et al. 2022). The maximum is over a whole range, so a sequence that
// fits in one range is never rescaled.
#pragma once

#include "scores.h"
#include "scratch.h"

namespace tformer::TFORMER_ISA {
namespace {

// Keys of one range: scores of a row tile within 24 KB of L1, packed keys and values within half of a 1 MB L2.
template <class P>
int64_t forward_range(const AttentionParams& p) {
  constexpr int64_t kScoreBytes = 24 * 1024, kPackedBytes = 512 * 1024;
  const int64_t size = sizeof(typename P::Real);
  const int64_t by_scores = kScoreBytes / (kTileRows * size);
  const int64_t by_packed = kPackedBytes * P::kStep / ((p.D + p.Dv) * size);
  const int64_t keys = (by_scores < by_packed ? by_scores : by_packed) / kKeyBlock * kKeyBlock;
  const int64_t all = round_up(p.Sk > 0 ? p.Sk : 1, kKeyBlock);
  return keys < kKeyBlock ? kKeyBlock : (keys < all ? keys : all);
}

// Softmax of a row as it grows: weight = e^(x - m), l = sum of the weights.
template <class Real>
struct OnlineSoftmax {
  static constexpr int L = kLanes<Real>;
  static constexpr int kChains = 4;  // of dependent operations, so that their latencies overlap
  Real m = -kInfinity<Real>;
  Real l = 0;

  // Scores s[0, n), x = s * scale, become weights; returns by what earlier sums and outputs have to be multiplied.
  TFORMER_INLINE Real update(Real* s, int64_t n, Real scale) {
    Vec<Real> top[kChains], sum[kChains];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) top[c] = splat(-kInfinity<Real>), sum[c] = Vec<Real>{};
    each_vector(n, [&](int64_t j, int c) TFORMER_LAMBDA { top[c] = maximum(load(s + j), top[c]); });
    const Real highest = max_lanes<Real>(maximum(maximum(top[0], top[1]), maximum(top[2], top[3]))) * scale;
    const Real m_new = highest > m ? highest : m;
    const Real shift = m_new == -kInfinity<Real> ? Real(0) : m_new;  // nothing visible yet: weights are e^-inf = 0
    each_vector(n, [&](int64_t j, int c) TFORMER_LAMBDA {
      const Vec<Real> weight = exp_vec<Real>(load(s + j) * scale - shift);
      sum[c] += weight;
      store(s + j, weight);
    });
    const Real rescale = m == m_new ? Real(1) : exp_vec<Real>(splat(m - shift))[0];
    l = l * rescale + sum_lanes<Real>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    m = m_new;
    return rescale;
  }

  // One more score x that has no value: it only takes weight. Returns the multiplier as update does.
  TFORMER_INLINE Real add_sink(Real x) {
    const Real m_new = x > m ? x : m;
    const Real rescale = m == m_new ? Real(1) : exp_vec<Real>(splat(m - m_new))[0];
    l = l * rescale + (x == -kInfinity<Real> ? Real(0) : exp_vec<Real>(splat(x - m_new))[0]);
    m = m_new;
    return rescale;
  }

  bool dead() const { return l == 0; }

 private:
  // f(position, chain) for each vector of [0, n); n is a whole number of vectors.
  template <class F>
  static TFORMER_INLINE void each_vector(int64_t n, F&& f) {
    int64_t j = 0;
    for (; j + kChains * L <= n; j += kChains * L) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) f(j + c * L, c);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kChains - 1; ++c) {
      if (j + c * L < n) f(j + c * L, c);
    }
  }
};

template <class T>
struct AttentionForward {
  using P = Pack<T>;
  using Real = typename P::Real;
  using Group = typename P::Group;
  using State = OnlineSoftmax<Real>;
  static constexpr int L = kLanes<Real>;

  const AttentionParams& p;
  const int64_t range_keys, q_groups, groups, out_columns;
  bool several_ranges;
  Group *keys, *values, *queries, *weights;
  Real *scores, *out;
  State* state;
  uint8_t *live, *hidden;

  AttentionForward(const AttentionParams& params, const AttentionTask& t, Scratch scratch)
      : p(params),
        range_keys(forward_range<P>(p)),
        q_groups(row_groups<P>(p.D)),
        groups((p.D + P::kStep - 1) / P::kStep),
        out_columns(round_up(p.Dv, L)),
        several_ranges(p.Sk > range_keys) {
    const int64_t tiles =
        several_ranges ? (t.h_end - t.h_begin) * ((t.q_end - t.q_begin + kTileRows - 1) / kTileRows) : 1;
    keys = scratch.take<Group>(range_keys * groups);
    values = scratch.take<Group>(range_keys / P::kStep * out_columns);
    queries = scratch.take<Group>(kTileRows * q_groups);
    scores = scratch.take<Real>(kTileRows * range_keys);
    weights = P::kStep == 1 ? reinterpret_cast<Group*>(scores) : scratch.take<Group>(kTileRows * range_keys / P::kStep);
    live = scratch.take<uint8_t>(range_keys / kPanel<P>);
    hidden = scratch.take<uint8_t>(kTileRows * range_keys);
    out = scratch.take<Real>(tiles * kTileRows * out_columns);
    state = scratch.take<State>(tiles * kTileRows);
    bytes = scratch.used();
  }
  size_t bytes;

  void run(const AttentionTask& t) {
    for (int64_t b = t.b_begin; b < t.b_end; ++b) {
      const Sequence s = sequence_of(p, b);
      int64_t h = t.h_begin;
      while (h < t.h_end) {  // query heads that share a key head share its packed keys and values
        const int64_t group = p.Hq / p.Hk, next = (h / group + 1) * group;
        const int64_t last = next < t.h_end ? next : t.h_end;
        run_group(t, s, b, h, last);
        h = last;
      }
    }
  }

 private:
  template <class V>
  V* row_of(const Rows& r, int64_t b, int64_t h, int64_t i) const {
    return static_cast<V*>(r.data) + b * r.stride[0] + h * r.stride[1] + i * r.stride[2];
  }

  void run_group(const AttentionTask& t, const Sequence& s, int64_t b, int64_t h_begin, int64_t h_end) {
    const int64_t q_end = t.q_end < s.Sq ? t.q_end : s.Sq;
    const int64_t kv_head = h_begin / (p.Hq / p.Hk);
    int64_t key0 = 0;
    do {
      const int64_t left = s.Sk - key0 < range_keys ? s.Sk - key0 : range_keys;
      const int64_t padded = round_up(left, L);
      const T* k = row_of<const T>(p.k, b, kv_head, s.k_begin + key0);
      const T* v = row_of<const T>(p.v, b, kv_head, s.k_begin + key0);
      pack_transposed<P>(k, p.k.stride[2], left, padded, p.D, keys);
      pack_down_rows<P>(v, p.v.stride[2], left, padded, p.Dv, values);
      bool finite = true;
      for (int64_t j = 0; j < left; ++j) finite &= row_is_finite(v + j * p.v.stride[2], p.Dv);
      const bool first = key0 == 0, last = key0 + left >= s.Sk;
      int64_t tile = 0;
      for (int64_t h = h_begin; h < h_end; ++h) {
        const Scores<Real> row_scores(p, s, b, h);
        for (int64_t i = t.q_begin; i < q_end; i += kTileRows, tile += several_ranges) {
          const int64_t rows = q_end - i < kTileRows ? q_end - i : kTileRows;
          Real* o = out + tile * kTileRows * out_columns;
          State* st = state + tile * kTileRows;
          if (i + kTileRows < q_end) prefetch_queries(s, b, h, i + kTileRows, q_end);
          if (first) start_tile(o, st);
          add_range(row_scores, s, b, h, i, rows, key0, padded, finite, o, st);
          if (last) finish_tile(s, b, h, i, rows, o, st);
        }
      }
      key0 += range_keys;
    } while (key0 < s.Sk);
  }

  // The rows of the next tile arrive while this one is computed.
  void prefetch_queries(const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t q_end) const {
    const T* q = row_of<const T>(p.q, b, h, s.q_begin + i);
    for (int64_t r = 0; r < kTileRows && i + r < q_end; ++r) prefetch_row(q + r * p.q.stride[2], p.D);
  }

  void start_tile(Real* o, State* st) const {
    for (int64_t j = 0; j < kTileRows * out_columns; j += L) store(o + j, Vec<Real>{});
    for (int r = 0; r < kTileRows; ++r) st[r] = State{};
  }

  // The keys [key0, key0 + padded) of one row tile: scores, weights, weighted sum of values.
  void add_range(const Scores<Real>& row_scores, const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t rows,
                 int64_t key0, int64_t padded, bool finite, Real* o, State* st) {
    const int64_t panels = (padded + kPanel<P> - 1) / kPanel<P>;
    int64_t first = panels, last = 0;
    for (int64_t n = 0; n < panels; ++n) {
      const int64_t j = key0 + n * kPanel<P>;
      live[n] = row_scores.any_visible(i, i + rows, j, j + kPanel<P>);
      if (live[n]) {
        first = n < first ? n : first;
        last = n + 1;
      }
    }
    if (first >= last) return;
    // whole key blocks, so that rows start on a Philox block
    first = first * kPanel<P> / kKeyBlock * kKeyBlock / kPanel<P>;
    pack_along_row<P>(row_of<const T>(p.q, b, h, s.q_begin + i), p.q.stride[2], rows, rows, p.D, queries);
    // of the last panel only the vectors that the last row sees a key of
    const int64_t seen = round_up(row_scores.range.end(i + rows - 1) - key0, L);
    const int64_t begin = first * kPanel<P>, end = seen < last * kPanel<P> ? seen : last * kPanel<P>, n = end - begin;
    multiply_keys(rows, first, end);
    const Real scale = row_scores.pending_scale();
    for (int64_t r = 0; r < rows; ++r) {
      Real* row = scores + r * range_keys + begin;
      row_scores.finish_row(row, i + r, key0 + begin, n, nullptr);
      if (!finite) {
        for (int64_t j = 0; j < n; ++j) hidden[r * range_keys + begin + j] = row[j] == -kInfinity<Real>;
      }
      const Real rescale = st[r].update(row, n, scale);
      if (rescale != 1) scale_row(o + r * out_columns, rescale);
      if (p.dropout_p > 0) drop_row(row, b, h, i + r, key0 + begin, n);
      narrow_along_row<P>(row, n, weights + (r * range_keys + begin) / P::kStep);
    }
    multiply_values(rows, first, end, finite, o);
  }

  // From panel `first` up to key `end` of the range.
  void multiply_keys(int64_t rows, int64_t first, int64_t end) const {
    for (int64_t n = first; n * kPanel<P> < end; ++n) {
      const int64_t columns = end - n * kPanel<P> < kPanel<P> ? end - n * kPanel<P> : kPanel<P>;
      Real* tile = scores + n * kPanel<P>;
      if (live[n]) {
        product<P>({queries, q_groups, 1, keys + n * groups * kPanel<P>, kPanel<P>, tile, range_keys, groups, false},
                   rows, columns);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < columns; ++j) tile[r * range_keys + j] = -kInfinity<Real>;
        }
      }
    }
  }

  void multiply_values(int64_t rows, int64_t first, int64_t end, bool finite, Real* o) const {
    const int64_t last = (end + kPanel<P> - 1) / kPanel<P>;
    const int64_t w_row = range_keys / P::kStep;
    constexpr int64_t kSumPanels = 256 / kPanel<P>;  // keys in one running sum
    for (int64_t n = first; n < last;) {
      int64_t run = n + 1;
      while (run < last && live[run] == live[n] && run % kSumPanels != 0) ++run;
      if (live[n]) {
        const int64_t j = n * kPanel<P>, stop = run * kPanel<P> < end ? run * kPanel<P> : end;
        const int64_t steps = (stop - j) / P::kStep;
        const ProductOperands<P> m{weights + j / P::kStep,
                                   w_row,
                                   1,
                                   values + j / P::kStep * out_columns,
                                   out_columns,
                                   o,
                                   out_columns,
                                   steps,
                                   true};
        if (finite) {
          product<P>(m, rows, out_columns);
        } else {
          product_without_hidden<P>(m, rows, out_columns, hidden + j, range_keys, 1);
        }
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

  // o / l and the log-sum-exp; a row without a visible key is 0 and -inf.
  void finish_tile(const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t rows, Real* o, State* st) const {
    Real* lse = static_cast<Real*>(p.lse) + b * p.lse_stride[0] + h * p.lse_stride[1] + s.q_begin;
    for (int64_t r = 0; r < rows; ++r, o += out_columns) {
      const bool dead = st[r].dead();
      if (p.sinks && !dead) scale_row(o, st[r].add_sink(sink_of<Real>(p, h)));
      lse[i + r] = dead ? -kInfinity<Real> : log_sum_exp(st[r]);
      const Real by = dead ? Real(0) : 1 / st[r].l;
      T* row = row_of<T>(p.o, b, h, s.q_begin + i + r);
      for (int64_t d = 0; d < p.Dv; d += L) {
        const Vec<Real> x = dead ? Vec<Real>{} : load(o + d) * by;
        if (p.Dv - d >= L) {
          store_as<Real>(row + d, x);
        } else {
          store_as<Real>(row + d, x, p.Dv - d);
        }
      }
    }
  }

  static Real log_sum_exp(const State& s) {
    return s.m + (sizeof(Real) == 4 ? static_cast<Real>(__builtin_logf(static_cast<float>(s.l)))
                                    : static_cast<Real>(__builtin_log(static_cast<double>(s.l))));
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
