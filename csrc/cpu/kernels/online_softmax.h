// Softmax of the rows of a tile as their keys come along (Milakov & Gimelshein 2018).
#pragma once

#include "packing.h"
#include "vec_math.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class Real>
constexpr Real kInfinity = static_cast<Real>(__builtin_inf());

// weight = e^(scale (x - m)), l = sum of the weights, lane by lane. The scale is positive. m is not always the largest
// score: it is left as it is until a score exceeds it by so much that a weight passes e^kSlack, which loses no accuracy
// and saves what a new m costs. What takes a row's lanes together is done for all rows at once, so that the latencies
// overlap.
// The exponent of 2 is one multiply-add, x * to_exp2 + shift, where the CPU has that: what the shift was rounded by is
// a factor of all weights of a row, and of l.
// k16Bits: the outputs have 16 bits.
template <bool k16Bits, class P>
struct OnlineSoftmax {
  using Real = typename P::Real;
  using Group = typename P::Group;
  static constexpr int L = kLanes<Real>, kTileRows = P::kTileRows;
  static constexpr int kChains = 4;  // of dependent operations, likewise
  static constexpr Real kSlack = 6;
  Real m[kTileRows];
  Vec<Real> l[kTileRows];
  bool empty;  // no key came along yet, and the output holds nothing
  // -m * to_exp2; and what a score may be without another m, or -inf where m is too large to be rounded so.
  Real shift[kTileRows], limit[kTileRows];

  void start() {
    empty = true;
    for (int r = 0; r < kTileRows; ++r) m[r] = limit[r] = -kInfinity<Real>, shift[r] = 0, l[r] = Vec<Real>{};
  }

  // What the weights of row r are relative to: l e^origin is the sum of e^(scale x).
  Real origin(int64_t r, Real scale) const {
    if (limit[r] == -kInfinity<Real>) return m[r] * scale;
    const Real to_exp2 = scale * kLog2e<Real>, rounded = m[r] * to_exp2 + shift[r];
    return m[r] * scale - rounded * kLn2<Real>;
  }

  // The largest of s[0, n), lane by lane.
  static TFORMER_INLINE Vec<Real> largest(const Real* s, int64_t n) {
    Vec<Real> top[kChains];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) top[c] = splat(-kInfinity<Real>);
    each_vector(n, [&](int64_t j, int c) TFORMER_LAMBDA { top[c] = maximum(load(s + j), top[c]); });
    return maximum(maximum(top[0], top[1]), maximum(top[2], top[3]));
  }

  // Takes in the largest scores of a row; returns by what its earlier weights and outputs have to be multiplied.
  TFORMER_INLINE Real raise(int64_t r, Vec<Real> top, Real scale) {
    if (!any_lane(top > limit_of(r, scale))) return 1;
    const Real before = m[r], shift_before = shift[r];
    const bool shifted = fused(r);
    start_at(r, max_lanes<Real>(top), scale);
    // no error of what was rounded differently before
    const Real power = shifted && fused(r) ? shift[r] - shift_before : (before - m[r]) * (scale * kLog2e<Real>);
    const Real factor = before == -kInfinity<Real> ? Real(0) : exp2_vec<Real>(splat(power))[0];
    l[r] *= factor;
    return factor;
  }

  // Scores s[0, n) of row r become weights, narrowed to `weights` if there is such a place.
  TFORMER_INLINE void weigh(int64_t r, Real* s, int64_t n, Real scale, Group* weights) {
    if constexpr (P::kTiles) return weigh_like_tiles(r, s, n, scale, weights);
    Vec<Real> sum[kChains] = {};
    const Real to_exp2 = scale * kLog2e<Real>;
    const auto weigh_by = [&](auto&& power) TFORMER_LAMBDA {
      const auto weight = [&](int64_t j, int c) TFORMER_LAMBDA {
        const Vec<Real> w = exp2_vec<Real, k16Bits>(power(load(s + j)));
        sum[c] += w;
        return w;
      };
      if (P::kStep == 1 || !weights) {
        each_vector(n, [&](int64_t j, int c) TFORMER_LAMBDA { store(s + j, weight(j, c)); });
      } else {
        each_vector(n, [&](int64_t j, int c) TFORMER_LAMBDA { P::store_along(weights + j / P::kStep, weight(j, c)); });
      }
    };
    if (fused(r)) {
      const Vec<Real> start = splat(shift[r]);
      weigh_by([&](Vec<Real> score) TFORMER_LAMBDA { return score * to_exp2 + start; });
    } else {
      const Vec<Real> from = splat(shift_of(r));
      weigh_by([&](Vec<Real> score) TFORMER_LAMBDA { return (score - from) * to_exp2; });
    }
    l[r] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // The keys of a register tile that its rows see: row r those from begin[r] to end[r], counted from the tile's first,
  // and of them those with a number other than 0 in `visible`.
  struct Bounds {
    bool begins, ends, masks;  // whether some of them hide anything
    Real begin[kTileRows], end[kTileRows];
    using Lane = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
    alignas(64) Lane visible[4 * L];
  };

  // The weights of a register tile of keys straight from its sums: the product of queries and keys is not stored.
  // Nothing happens, and false is returned, if m would have to be raised other than for the first keys. `seen` is null
  // where all rows see all keys.
  template <int kRows, int kColumns>
  __attribute__((noinline)) bool weigh_tile(const ProductOperands<P>& product, const Group* keys, const Bounds* seen,
                                            Real scale, Group* weights, int64_t weights_row) {
    Vec<Real> acc[kRows][kColumns];
    multiply_tile<P>(product, product.a, keys, product.steps, acc);
    if (seen) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) hide(acc[r], *seen, r);
    }
    bool first = true, within = true;
    Vec<Real> top[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      top[r] = acc[r][0];
#pragma GCC unroll 4
      for (int n = 1; n < kColumns; ++n) top[r] = maximum(acc[r][n], top[r]);
      first &= m[r] == -kInfinity<Real>;
      within &= !any_lane(top[r] > splat(limit[r]));
    }
    if (first) {
      for (int r = 0; r < kRows; ++r) start_at(r, max_lanes<Real>(top[r]), scale);
      for (int r = 0; r < kRows; ++r) {
        if (!fused(r)) return false;
      }
    } else if (!within) {
      return false;
    }
    const Real to_exp2 = scale * kLog2e<Real>;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<Real> start = splat(shift[r]);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) {
        acc[r][n] = exp2_vec<Real, k16Bits>(acc[r][n] * to_exp2 + start);
        P::store_along(weights + r * weights_row + n * L / P::kStep, acc[r][n]);
      }
      Vec<Real> sum[kChains] = {};  // in the order of weigh
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) sum[n] = acc[r][n];
      l[r] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    return true;
  }

  // weigh, with the bits of weigh_scores.
  TFORMER_INLINE void weigh_like_tiles(int64_t r, Real* s, int64_t n, Real scale, Group* weights) {
#if TFORMER_HAS_TILES
    const Scaling by(scale);
    const Real from = shift_of(r);
    const F start = splat(shift[r]);
    const bool short_way = fused(r);
    for (int64_t j = 0; j < n; j += 2 * L) {
      F weight[2];
      for (int i = 0; i < 2; ++i) {
        const F score = load(s + j + i * L);
        weight[i] =
            short_way ? weight_in_tiles(score, start, by) : exp2_vec<float, k16Bits>((score - from) * by.to_exp2);
        l[r] += weight[i];
        if (!weights) store(s + j + i * L, weight[i]);
      }
      if (!weights) continue;
      P::store_two_along(weights + j / (2 * L) * kTileUnit<P>, separable<P>(weight[0]), separable<P>(weight[1]));
    }
#endif
  }

#if TFORMER_HAS_TILES
  // What the exponent of a score is multiplied with.
  struct Scaling {
    Real scale, to_exp2;
    explicit Scaling(Real by) : scale(by), to_exp2(by * kLog2e<Real>) {}
  };

  // Likewise of rows from r on, whose sums tile registers have left in memory. leave(i, n, weight): what becomes of
  // vector n of row r + i once it is part of l.
  template <int kRows, int kColumns, class Leave>
  TFORMER_INLINE bool weigh_scores(int64_t r, const Real* scores, int64_t scores_row, const Bounds* seen,
                                   const Scaling& by, Group* weights, Leave&& leave) {
    F x[kRows][kColumns], top[kRows];
    LaneMask above = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) x[i][n] = load(scores + i * scores_row + n * L);
      if (__builtin_expect(seen != nullptr, 0)) hide(x[i], *seen, r + i);
      top[i] = x[i][0];
#pragma GCC unroll 4
      for (int n = 1; n < kColumns; ++n) top[i] = maximum(x[i][n], top[i]);
      above |= greater(top[i], splat(limit[r + i]));
    }
    if (__builtin_expect(above != 0, 0)) {
      for (int i = 0; i < kRows; ++i) {
        if (m[r + i] != -kInfinity<Real>) return false;
      }
      for (int i = 0; i < kRows; ++i) start_at(r + i, max_lanes<Real>(top[i]), by.scale);
      for (int i = 0; i < kRows; ++i) {
        if (!fused(r + i)) return false;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const F start = splat(shift[r + i]);
      F sum = l[r + i];
#pragma GCC unroll 2
      for (int n = 0; n < kColumns; n += 2) {
        const F first = weight_in_tiles(x[i][n], start, by), second = weight_in_tiles(x[i][n + 1], start, by);
        P::store_two_along(weights + i * kTileSide + n / 2 * kTileUnit<P>, leave(i, n, first), leave(i, n + 1, second));
        sum += first;
        sum += second;
      }
      l[r + i] = sum;
    }
    return true;
  }
#endif

 private:
  // The scores of row r that it does not see.
  template <int kColumns>
  static TFORMER_INLINE void hide(Vec<Real> (&x)[kColumns], const Bounds& seen, int64_t r) {
    const Vec<Real> lane = lane_index<Real>(), none = splat(-kInfinity<Real>);
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      const Real first = static_cast<Real>(n * L);
      if (seen.ends) x[n] = (lane < seen.end[r] - first) ? x[n] : none;
      if (seen.begins) x[n] = (lane < seen.begin[r] - first) ? none : x[n];
      if (seen.masks) x[n] = (load(seen.visible + n * L) != 0) ? x[n] : none;
    }
  }

  // m for the largest score x. Where weights are in slices the shift is a whole number.
  TFORMER_INLINE void start_at(int64_t r, Real x, Real scale) {
    m[r] = x, shift[r] = 0, limit[r] = -kInfinity<Real>;
    const Real to_exp2 = scale * kLog2e<Real>, power = x * to_exp2;
    const bool moderate = power < 65536 && power > -65536;
    if (!kFusesMultiplyAdd || !moderate) return;
    shift[r] = -power;
#if TFORMER_HAS_TILES
    if constexpr (P::kSlices > 1) shift[r] = round_whole(splat(-power))[0], m[r] = -shift[r] / to_exp2;
#endif
    limit[r] = limit_of(r, scale);
  }
  // Whether the exponent of a weight is one multiply-add, or nothing is visible yet.
  TFORMER_INLINE bool fused(int64_t r) const { return limit[r] != -kInfinity<Real> || m[r] == -kInfinity<Real>; }

#if TFORMER_HAS_TILES
  static TFORMER_INLINE F weight_in_tiles(F score, F start, const Scaling& by) {
    return exp2_vec<float, k16Bits>(score * by.to_exp2 + start);
  }
#endif
  TFORMER_INLINE Real limit_of(int64_t r, Real scale) const { return m[r] + kSlack / scale; }
  // Nothing visible yet: weights are e^-inf = 0.
  TFORMER_INLINE Real shift_of(int64_t r) const { return m[r] == -kInfinity<Real> ? Real(0) : m[r]; }

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

}  // namespace
}  // namespace tformer::TFORMER_ISA
