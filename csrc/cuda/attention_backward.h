// Gradients of attention_forward.h from the saved log-sum-exp (Dao et al. 2022, section 3.1 and appendix B):
//   p = exp(score - lse), dv = pT do, dp = do vT, ds = p (dp - delta), dq = scale ds k, dk = scale dsT q.
// 16-bit elements: one pass over tiles of keys, attention_dqkv.h. Else two, so that every sum has one block and one
// order: dk and dv by tiles of keys, attention_dkv.h, and dq by tiles of queries, attention_dq.h.
#pragma once

#include <type_traits>

#include "attention_dropout.h"
#include "attention_launch.h"
#include "attention_rows.h"
#include "attention_scores.h"
#include "attention_work.h"

namespace tformer::gpu {

// A block keeps kRows rows of one side (queries and do, or keys and values) and goes through the other side in tiles of
// kOther rows, two at a time where shared memory allows: 32 KB for each of what is kept, 32 KB for what passes through
// (64 KB for float64 above 128).
template <class T, int kWidth>
struct BackwardShape {
  static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(T));
  static constexpr int kOther = kRowBytes <= 512 ? 8192 / kRowBytes : 16;
  static constexpr int kStages = kOther * kRowBytes <= 8192 ? 2 : 1;
  static constexpr int rows(int most) { return 32768 / kRowBytes < most ? 32768 / kRowBytes : most; }
};

template <class R>
struct Differentiated {
  R p, ds, dbias;
};

// One pair: the product q.k and dp of its row and column become p and ds. `visible`: by position. What
// a mask by keys hides of plain scores is -inf already.
template <class T>
TFORMER_DEVICE Differentiated<Real<T>> differentiate(const Scores<T, true>& scores, Real<T> product, Real<T> dp,
                                                     Real<T> lse, Real<T> delta, bool visible) {
  using R = Real<T>;
  const R p = scores.weight(visible ? product : -kInfinity<R>, lse);
  return {p, p * (dp - delta), R(0)};
}
// The same of a score, with the derivative of its softcap.
template <class T>
TFORMER_DEVICE Differentiated<Real<T>> differentiate(const Scores<T, false>& scores, Real<T> x, Real<T> cap, Real<T> dp,
                                                     Real<T> lse, Real<T> delta, Real<T> kept, bool visible) {
  using R = Real<T>;
  const bool counts = visible && x != -kInfinity<R>;  // else 0, whatever the others are
  const R p = counts ? scores.weight(x, lse) : R(0);
  const R ds = p * (dp * kept - delta);
  return {p * kept, counts ? ds * cap : R(0), counts ? ds : R(0)};
}

// kept of a pair: 1 without dropout.
template <class R>
struct KeptScale {
  R scale;
  bool dropout;
  TFORMER_DEVICE explicit KeptScale(const AttentionParams& p)
      : scale(static_cast<R>(p.dropout_p > 0 ? dropout_scale(p.dropout_p) : 1)), dropout(p.dropout_p > 0) {}
};

// Transposed scores, a warp's keys by queries: keys from row0 on, queries from i0 on, whose lse, as weights take it,
// and delta lie one after the other. Products s become weights, dp ds. Plain: a mask by keys and positions say what is
// seen.
template <class P, class T, int kLaneRows, int kC>
TFORMER_DEVICE void differentiate_keys(const Scores<T, true>& scores, int key_length, int row0, int i0,
                                       const Real<T>* lse, const Real<T>* delta, Real<T> (&s)[kLaneRows][kC],
                                       Real<T> (&dp)[kLaneRows][kC]) {
  using R = Real<T>;
  if (scores.p.mask.data) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int j = row0 + P::row(r);
      if (j >= key_length || scores.shows_key(j)) continue;
#pragma unroll
      for (int c = 0; c < kC; ++c) s[r][c] = -kInfinity<R>;
    }
  }
  const auto for_pairs = [&](auto some) {  // only some of them are visible
    constexpr bool kSome = decltype(some)::value;
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const int n = P::column(c), i = i0 + n;
      const R lse_of = lse[n], delta_of = delta[n];
      const int begin = kSome ? scores.range.begin(i) - row0 : 0;
      const int end = kSome && i < scores.Sq ? scores.range.end(i) - row0 : 0;
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const int j = P::row(r);
        const bool visible = !kSome || (j >= begin && j < end);
        const auto g = differentiate(scores, s[r][c], dp[r][c], lse_of, delta_of, visible);
        s[r][c] = g.p, dp[r][c] = g.ds;
      }
    }
  };
  if (scores.all_visible(i0, i0 + 4 * kC, row0, row0 + 8 * kLaneRows)) {
    for_pairs(std::false_type{});
  } else {
    for_pairs(std::true_type{});
  }
}
// Whatever scores may have. kept(n, j): of query i0 + n and key j, as differentiate wants it. dbias(r, visible, i,
// j, x) takes the bias's gradient of each pair, in the lane's row r; 0 where the pair is not visible.
template <class P, class T, int kLaneRows, int kC, class Kept, class Dbias>
TFORMER_DEVICE void differentiate_keys(const Scores<T, false>& scores, int row0, int i0, const Real<T>* lse,
                                       const Real<T>* delta, Real<T> (&s)[kLaneRows][kC], Real<T> (&dp)[kLaneRows][kC],
                                       Kept&& kept, Dbias&& dbias) {
  using R = Real<T>;
  const bool all_visible = scores.all_visible(i0, i0 + 4 * kC, row0, row0 + 8 * kLaneRows);
  scores.for_operands([&](auto by_tile) {
    constexpr bool kByTile = decltype(by_tile)::value;
    if constexpr (kByTile) {
      scores.add_operands(s, [&](int r, int c) { return Pair{i0 + P::column(c), row0 + P::row(r)}; });
    }
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const int n = P::column(c), i = i0 + n;
      const R lse_of = lse[n], delta_of = delta[n];
      int begin = 0, end = 8 * kLaneRows;
      if (!all_visible) {
        begin = scores.range.begin(i) - row0;
        end = i < scores.Sq ? scores.range.end(i) - row0 : 0;
      }
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const int j = P::row(r);
        const bool visible = j >= begin && j < end;
        R x = s[r][c], cap = 1;
        if constexpr (!kByTile) {
          const Pair of = scores.nearest({i, row0 + j});
          x = scores.score(x, of.i, of.j, cap);
        }
        const auto g = differentiate(scores, x, cap, dp[r][c], lse_of, delta_of, kept(n, row0 + j), visible);
        s[r][c] = g.p, dp[r][c] = g.ds;
        dbias(r, visible, i, row0 + j, g.dbias);
      }
    }
  });
}

// Which of a warp's rows hold something that is not finite, a bit each.
template <class P, class R, int kLaneRows, int kO>
TFORMER_DEVICE unsigned suspect_rows(const R (&x)[kLaneRows][kO]) {
  unsigned suspects = 0;
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
    bool finite = true;
#pragma unroll
    for (int d = 0; d < kO; ++d) finite = finite && is_finite(x[r][d]);
    const unsigned quads = ballot(!finite);
    for (int g = 0; g < 8; ++g) suspects |= (quads >> 4 * g & 15 ? 1u : 0u) << (8 * r + g);
  }
  return suspects;
}

}  // namespace tformer::gpu
