// The row tiles of attention_forward.h: scores of the keys that they see, weights, sums of weighted values.
#pragma once

#include "forward_keys.h"
#include "online_softmax.h"
#include "scores.h"
#include "scratch.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class T, class P>
struct AttentionRowTiles {
  using Real = typename P::Real;
  using Group = typename P::Group;
  using State = OnlineSoftmax<sizeof(T) == 2, P>;
  using Product = ProductOperands<P>;
  using Results = IntoRows<P, T>;
  static constexpr int L = kLanes<Real>, kTileRows = P::kTileRows, kTileColumns = P::kTileColumns, kSlices = P::kSlices;
  static constexpr int64_t kStrip = kTileColumns * L;  // columns of a register tile

  const AttentionParams& p;
  const int64_t range_keys, stretch_keys, q_groups, groups, out_columns;
  const int64_t weight_groups;  // of a row of weights
  Group *keys, *values, *queries;
  Group *weights, *other_weights;  // of the present stretch; in tile registers there are those of two, in turn
  Real* scores;
  uint8_t *live, *hidden;
  const Dropout dropout;
  FiniteSlices<P> finite_keys, finite_queries;
  // Where so few rows meet the keys of a range that packing would take longer than it saves: keys and values in the
  // caller's tensors, or null; of values only numbers that products take as they are, or in pairs.
  static constexpr bool kReadsKeys = !P::kTiles, kReadsPairs = P::kStep == 2 && !P::kTiles;
  static constexpr bool kReadsValues = std::is_same_v<T, Group> || kReadsPairs;
  const T *keys_in_place = nullptr, *values_in_place = nullptr;
  int64_t keys_present = 0;  // of the range

  AttentionRowTiles(const AttentionParams& params, Scratch& scratch)
      : p(params),
        range_keys(ForwardKeys<P>(p).range),
        stretch_keys(ForwardKeys<P>(p).stretch),
        q_groups(row_groups<P>(p.D)),
        groups(sum_groups<P>(p.D)),
        out_columns(round_up(p.Dv, L)),
        weight_groups(stretch_keys / P::kStep),
        dropout(p.dropout_p, p.dropout_seed) {
    constexpr int64_t kInTurn = P::kTiles ? 2 : 1;
    keys = scratch.take<Group>(range_keys * kSlices * groups);
    values = scratch.take<Group>(range_keys / P::kStep * kSlices * out_columns);
    queries = scratch.take<Group>(kTileRows * kSlices * q_groups);
    scores = scratch.take<Real>(kInTurn * kTileRows * score_keys());
    const auto take_weights = [&] { return scratch.take<Group>(kTileRows * kSlices * weight_groups); };
    weights = P::kStep == 1 ? reinterpret_cast<Group*>(scores) : take_weights();
    other_weights = P::kTiles ? take_weights() : nullptr;
    live = scratch.take<uint8_t>(range_keys / kPanel<P>);
    hidden = scratch.take<uint8_t>(kTileRows * stretch_keys);
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

  // Keys of a range, from the first one of a key block on; a whole number of vectors. No row sees those before
  // seen_begin, a whole number of vectors, nor those from seen_end on, whole units of a sum.
  struct Span {
    int64_t begin, end, seen_begin, seen_end;
  };

  // Keys [from, to) of the range from key0, in the stretch from `begin` on.
  struct Keys {
    int64_t key0, begin, from, to;

    int64_t at() const { return from - begin; }
    int64_t count() const { return to - from; }
  };

  // Those of the keys [key0, key0 + padded) that some row of the tile sees.
  Span seen_keys(const Scores<Real>& row_scores, const Tile& tile, int64_t key0, int64_t padded) const {
    const KeyRange& range = row_scores.range;
    // what some row of the tile sees by position, and what all of them see
    const int64_t seen = clamp(range.begin(tile.i) - key0, 0, padded);
    const int64_t seen_end = clamp(range.end(tile.last_query()) - key0, 0, padded);
    if (seen >= seen_end) return {};
    int64_t first = seen / kPanel<P>, last = panels(seen_end);
    for (int64_t n = first; n < last; ++n) live[n] = 1;
    if (row_scores.mask) leave_out_hidden(row_scores, tile, key0, first, last);
    if (first >= last) return {};
    // whole key blocks, so that rows start on a Philox block; of the last panel only vectors that a row sees a key of
    first = first * kPanel<P> / kKeyBlock * kKeyBlock / kPanel<P>;
    const int64_t begin = first * kPanel<P>, vectors = round_up(seen_end, kColumnUnit<P>);
    const int64_t last_end = last * kPanel<P>, end = vectors < last_end ? vectors : last_end;
    return {begin, end, clamp(seen / kColumnUnit<P> * kColumnUnit<P>, begin, end),
            clamp(round_up(seen_end, kUnit<P>), begin, end)};
  }

  // Keys of which scores are in memory at a time: a stretch; in tile registers, so many as L1 has beside all else.
  int64_t score_keys() const { return P::kTiles ? kKeyBlock : stretch_keys; }

  // The weights of one row tile.
  void weigh(const Scores<Real>& row_scores, const Tile& tile, const Product& q_k, int64_t key0, const Span& seen,
             int64_t fetches, bool finite, Upcoming<T>& next) {
    if (seen.begin >= seen.end) return;
    Real rescale[kTileRows];
    for (int64_t r = 0; r < tile.rows; ++r) rescale[r] = 1;
    const bool plain = kTileColumns == 4 && row_scores.by_keys && finite && p.dropout_p == 0 && !keys_in_place;
    const int64_t step = plain ? kPanel<P> : seen.end - seen.begin;
    for (int64_t j = seen.begin; j < seen.end; j += step) {
      const int64_t from = plain && j < seen.seen_begin ? seen.seen_begin : j;
      const Keys some{key0, seen.begin, from, j + step < seen.end ? j + step : seen.end};
      if (fetches-- > 0) next.fetch();
      if (plain && (some.from >= some.to || !live[j / kPanel<P>])) continue;
      typename State::Bounds bounds;
      const bool edge = plain && bounds_of(row_scores, tile, some, bounds);
      if (!plain || !weigh_panel(tile, q_k, edge ? &bounds : nullptr, some, row_scores.pending_scale())) {
        multiply_keys(q_k, tile.rows, some);
        add_rows(row_scores, tile, some, 0, tile.rows, false, finite, rescale);
      }
      if (fetches-- > 0) next.fetch();
    }
    for (; fetches > 1; --fetches) next.fetch();
    scale_sums(tile, rescale);
  }

  // What was summed before m was raised.
  void scale_sums(const Tile& tile, const Real* rescale) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (!tile.state.empty && rescale[r] != 1) scale_row(tile.o + r * out_columns, rescale[r]);
    }
  }

  // Which of these keys each row of the tile sees, where nothing else is to be known; false if all rows see all.
  bool bounds_of(const Scores<Real>& row_scores, const Tile& tile, const Keys& some,
                 typename State::Bounds& bounds) const {
    const KeyRange& range = row_scores.range;
    const int64_t from = some.key0 + some.from, to = some.key0 + some.to;
    bounds.begins = from<range.begin(tile.last_query()), bounds.ends = to> range.end(tile.i);
    bounds.masks = row_scores.mask && row_scores.hides_keys(from, some.count(), bounds.visible);
    if (!bounds.begins && !bounds.ends) return bounds.masks;
    for (int64_t r = 0; r < tile.rows; ++r) {
      bounds.begin[r] = static_cast<Real>(range.begin(tile.query(r)) - from);
      bounds.end[r] = static_cast<Real>(range.end(tile.query(r)) - from);
    }
    return true;
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

  bool any_live(const Span& span) const {
    for (int64_t n = span.begin / kPanel<P>; n < panels(span.end); ++n) {
      if (live[n]) return true;
    }
    return false;
  }

  static int64_t panels(int64_t n) { return (n + kPanel<P> - 1) / kPanel<P>; }
  static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

  // q.k of a tile, but for the panel of keys.
  Product keys_product(const Sequence& s, const Tile& tile) {
    const T* q = row_of<const T>(p.q, tile.b, tile.h, s.q_begin + tile.i);
    const int64_t stride = tile.rows_are_heads ? p.q.stride[1] : p.q.stride[2];
    Product m = packed_product<P>(queries, q_groups, nullptr, kPanel<P>, groups, groups);
    if (!keys_in_place && in_place<P, T>(p.D, stride, tile.rows)) {
      m.take_rows(reinterpret_cast<const Group*>(q), stride / P::kStep);
    } else {
      const int64_t padded = round_up(tile.rows, P::kRowUnit);
      pack_along_row<P>(q, stride, tile.rows, padded, p.D, queries, finite_queries = {});
    }
    return m;
  }

  // The product of the weights of the keys [from, to) of a stretch with their values.
  Product values_product(const Group* of, const Span& stretch, int64_t from, int64_t to) const {
    const int64_t steps = range_keys / P::kStep;
    if constexpr (std::is_same_v<T, Group>) {
      if (values_in_place) {
        const int64_t stride = p.v.stride[2], count = clamp(keys_present, from, to) - from;
        return packed_product<P>(of + (from - stretch.begin), weight_groups, values_in_place + from * stride, stride, 0,
                                 count);
      }
    }
    return packed_product<P>(of + place_along<P>(0, (from - stretch.begin) / P::kStep, weight_groups), weight_groups,
                             values + place_down<P>(from / P::kStep, 0, out_columns, steps), out_columns, steps,
                             (to - from) / P::kStep);
  }

  // The weights of keys, at most one panel, without scores in memory; false where that is no way.
  bool weigh_panel(const Tile& tile, const Product& m, const typename State::Bounds* seen, const Keys& some,
                   Real scale) const {
    if constexpr (P::kTileColumns == 4) {
      const int64_t in_panel = some.from % kPanel<P>;
      const Group* panel = keys + panel_place<P>(some.from - in_panel, groups) + in_panel * (P::kZipped ? 2 : 1);
      Group* to_weights = weights + some.at() / P::kStep;
      switch (some.count() / L) {
        case 1:
          return weigh_columns<1>(tile, m, seen, panel, scale, to_weights);
        case 2:
          return weigh_columns<2>(tile, m, seen, panel, scale, to_weights);
        case 3:
          return weigh_columns<3>(tile, m, seen, panel, scale, to_weights);
        default:
          return weigh_columns<4>(tile, m, seen, panel, scale, to_weights);
      }
    }
    return false;
  }

  template <int kColumns>
  bool weigh_columns(const Tile& tile, const Product& m, const typename State::Bounds* seen, const Group* panel,
                     Real scale, Group* w) const {
    const int64_t w_row = weight_groups;
    return with_tile_rows<P>(tile.rows, [&](auto rows) TFORMER_LAMBDA {
      return tile.state.template weigh_tile<rows, kColumns>(m, panel, seen, scale, w, w_row);
    });
  }

  // Scores in memory of the rows [r_begin, r_end), or products that are to be finished, become weights; those of the
  // stretch that are before them are so already.
  void add_rows(const Scores<Real>& row_scores, const Tile& tile, const Keys& some, int64_t r_begin, int64_t r_end,
                bool finished, bool finite, Real* rescale) {
    const int64_t at = some.at(), n = some.count(), key = some.key0 + some.from;
    const Real scale = row_scores.pending_scale();
    Vec<Real> top[kTileRows];
    for (int64_t r = r_begin; r < r_end; ++r) {
      Real* row = scores_of(r, some);
      if (!finished) row_scores.finish_row(row, tile.query(r), key, n, nullptr);
      top[r] = State::largest(row, n);
      if (!finite) {
        for (int64_t j = 0; j < n; ++j) hidden[r * stretch_keys + at + j] = row[j] == -kInfinity<Real>;
      }
    }
    for (int64_t r = r_begin; r < r_end; ++r) {
      const Real factor = tile.state.raise(r, top[r], scale);
      if (factor == 1) continue;
      rescale[r] *= factor;
      for (int64_t j = 0; j < at / P::kStep; j += L) P::scale(weights + place_along<P>(r, j, weight_groups), factor);
    }
    for (int64_t r = r_begin; r < r_end; ++r) {
      Real* row = scores_of(r, some);
      Group* row_weights = weights_of(r, some);
      tile.state.weigh(r, row, n, scale, p.dropout_p > 0 ? nullptr : row_weights);
      if (p.dropout_p > 0) {
        drop_row(row, counter_of(tile, r), key, n);
        narrow_along_row<P>(row, n, row_weights);
      }
    }
  }

  Group* weights_of(int64_t r, const Keys& some) const {
    return weights + place_along<P>(r, some.at() / P::kStep, weight_groups);
  }

  // In tile registers there are scores of two key blocks, in turn.
  Real* scores_of(int64_t r, const Keys& some) const {
    if (!P::kTiles) return scores + r * stretch_keys + some.at();
    return scores + (some.from / kKeyBlock % 2 * kTileRows + r) * kKeyBlock;
  }

  void multiply_keys(const Product& m, int64_t rows, const Keys& some) const {
    multiply_keys(m, rows, some, []() TFORMER_LAMBDA {});
  }

  // beside: see tile_registers.
  template <class Beside>
  void multiply_keys(Product m, int64_t rows, const Keys& some, Beside&& beside) const {
    Real* to = scores_of(0, some);
    for (int64_t n = some.from / kPanel<P>; n * kPanel<P> < some.to; ++n) {
      const int64_t columns = some.to - n * kPanel<P> < kPanel<P> ? some.to - n * kPanel<P> : kPanel<P>;
      const IntoSums<P> panel{to + n * kPanel<P> - some.from, score_keys(), false};
      m.b = keys + panel_place<P>(n * kPanel<P>, groups);
      if constexpr (kReadsKeys) {
        if (live[n] && keys_in_place) {
          multiply_keys_in_place(m, rows, n * kPanel<P>, columns, panel.c);
          continue;
        }
      }
      if (live[n]) {
        if (!finite_keys.holds() || !finite_queries.holds()) {
          product_without_hidden<P>(m, rows, columns, panel, Hidden{});
        } else if constexpr (P::kTiles) {
          tile_product(rows, static_cast<int>(columns / L), m, panel, beside, m.a, m.b, m.steps, int64_t{0},
                       int64_t{0});
        } else {
          product<P>(m, rows, columns, panel);
        }
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < columns; ++j) panel.c[r * score_keys() + j] = -kInfinity<Real>;
        }
      }
    }
  }

  // Products of rows with the keys [from, from + columns) of the range, along the keys; those not present count as 0.
  void multiply_keys_in_place(const Product& m, int64_t rows, int64_t from, int64_t columns, Real* to) const {
    const int64_t present = clamp(keys_present - from, 0, columns);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = present / L * L; j < columns; j += L) store(to + r * score_keys() + j, Vec<Real>{});
    }
    with_tile_rows<P>(rows, [&](auto count) TFORMER_LAMBDA { multiply_along_keys<count>(m, from, present, to); });
  }

  template <int kRows>
  TFORMER_INLINE void multiply_along_keys(const Product& m, int64_t from, int64_t count, Real* to) const {
    const int64_t stride = p.k.stride[2], row = score_keys(), a_row = m.a_row;
    const int64_t whole = p.D / (L * P::kStep) * L, ahead = keys_present - kRowsAhead;
    for (int64_t j = 0; j < count; j += kTileColumns) {
      const T* key[kTileColumns];  // the last one again where there are fewer
      for (int64_t n = 0; n < kTileColumns; ++n) {
        key[n] = keys_in_place + (from + (j + n < count ? j + n : count - 1)) * stride;
        if (from + j + n < ahead) prefetch_row(key[n] + kRowsAhead * stride, p.D);
      }
      Vec<Real> acc[kRows][kTileColumns] = {};
      const auto add = [&](int64_t d, int64_t end) TFORMER_LAMBDA {
        Vec<Group> groups_of[kTileColumns];
#pragma GCC unroll 4
        for (int n = 0; n < kTileColumns; ++n) groups_of[n] = load_groups<P>(key[n], d, end).slice[0];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vec<Group> x = load(m.a + r * a_row + d);
#pragma GCC unroll 4
          for (int n = 0; n < kTileColumns; ++n) acc[r][n] = P::multiply_add(x, groups_of[n], acc[r][n]);
        }
      };
      for (int64_t d = 0; d < whole; d += L) add(d, (d + L) * P::kStep);
      if (whole * P::kStep < p.D) add(whole, p.D);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < kTileColumns; ++n) {
          if (j + n < count) to[r * row + j + n] = sum_lanes<Real>(acc[r][n]);
        }
      }
    }
  }

  // Adds the weighted values of a stretch to the tile's sums; or, where `results` are asked for, writes all of the sums
  // there.
  void multiply_values(const Tile& tile, const Span& span, bool finite, const Results* results) const {
    constexpr int64_t kSumPanels = 256 / kPanel<P>;  // keys in one running sum
    const int64_t last = panels(span.end);
    for (int64_t n = span.seen_begin / kPanel<P>; n < last;) {
      int64_t run = n + 1;
      while (run < last && live[run] == live[n] && run % kSumPanels != 0) ++run;
      if (live[n]) {
        const int64_t j = clamp(n * kPanel<P>, span.seen_begin, span.seen_end);
        const int64_t stop = clamp(run * kPanel<P>, j, span.seen_end);
        const Product m = values_product(weights, span, j, stop);
        const IntoSums<P> sums{tile.o, out_columns, !tile.state.empty};
        const auto multiply = [&](const auto& into) TFORMER_LAMBDA {
          if constexpr (kReadsPairs) {
            if (values_in_place) return multiply_pairs_in_place(m, tile.rows, j, clamp(keys_present, j, stop), into);
          }
          product<P>(m, tile.rows, out_columns, into);
        };
        if (!finite) {
          product_without_hidden<P>(m, tile.rows, out_columns, sums,
                                    Hidden{hidden + j - span.begin, stretch_keys, 1, 0});
        } else if (results && run == last) {
          *results->progress = tile.state.empty ? kLast : kLast | kSums;
          multiply(*results);
        } else {
          multiply(sums);
        }
        tile.state.empty = false;
      }
      n = run;
    }
  }

  // The product of weights with the values of the keys [from, to) of the range, where they lie: rows of whole vectors,
  // two of which are zipped to pairs.
  template <class Into>
  void multiply_pairs_in_place(const Product& m, int64_t rows, int64_t from, int64_t to, const Into& into) const {
    const T* values_of = values_in_place + from * p.v.stride[2];
    for (int64_t d = 0; d < p.Dv; d += kPanel<P>) {
      with_tile_rows<P>(rows, [&](auto count) TFORMER_LAMBDA {
        if (p.Dv - d >= 4 * L) {
          multiply_pairs_of_rows<count, 4>(m, values_of, to - from, d, into);
        } else {
          multiply_pairs_of_rows<count, 2>(m, values_of, to - from, d, into);
        }
      });
    }
  }

  template <int kRows, int kColumns, class Into>
  __attribute__((noinline)) void multiply_pairs_of_rows(const Product& m, const T* values_of, int64_t count, int64_t d,
                                                        const Into& into) const {
    using Elements = Vec<int16_t>;
    using Indices = std::make_integer_sequence<int, 2 * L>;
    const int64_t stride = p.v.stride[2], a_row = m.a_row;
    const T* row = values_of + d;
    Vec<Real> acc[kRows][kColumns] = {};
    for (int64_t k = 0; 2 * k < count; ++k, row += 2 * stride) {
      const T* next = 2 * k + 1 < count ? row + stride : row;  // a key that is not present weighs nothing
      Vec<Group> pairs[kColumns];
#pragma GCC unroll 2
      for (int n = 0; n < kColumns; n += 2) {
        const auto low = load_bytes<Elements>(row + n * L), high = load_bytes<Elements>(next + n * L);
        pairs[n] = (Vec<Group>)zip<false>(low, high, Indices{}),
        pairs[n + 1] = (Vec<Group>)zip<true>(low, high, Indices{});
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; ++n) acc[r][n] = P::multiply_add(m.a[r * a_row + k], pairs[n], acc[r][n]);
      }
    }
    into(0, d, acc);
  }

  void scale_row(Real* o, Real by) const {
    for (int64_t d = 0; d < out_columns; d += L) store(o + d, load(o + d) * by);
  }

  static DropoutRow counter_of(const Tile& tile, int64_t r) {
    return {static_cast<uint32_t>(tile.query(r)), static_cast<uint32_t>(tile.head(r)), static_cast<uint32_t>(tile.b)};
  }

  void drop_row(Real* row, const DropoutRow& counter, int64_t key, int64_t n) const {
    alignas(64) Real factor[kPhiloxBlock];
    for (int64_t j = 0; j < n; j += kPhiloxBlock) {
      const int64_t count = n - j < kPhiloxBlock ? n - j : kPhiloxBlock;
      dropout.factors(counter, key + j, factor);
      for (int64_t c = 0; c < count; ++c) row[j + c] *= factor[c];
    }
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
