// Gradients of attention_forward.h from the saved log-sum-exp (Dao et al. 2022, section 3.1 and appendix B):
//   p = exp(score - lse), dv = pT do, dp = do vT, ds = p (dp - delta), dq = scale ds k, dk = scale dsT q.
// Two kernels, so that every sum has one block and one order: dk and dv by tiles of keys, dq by tiles of queries.
#pragma once

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
template <OperandSet kSet, class T>
TFORMER_DEVICE Differentiated<Real<T>> differentiate(const Scores<T, false>& scores, Real<T> product, Real<T> dp,
                                                     Real<T> lse, Real<T> delta, Real<T> kept, bool visible, int i,
                                                     int j) {
  using R = Real<T>;
  if (!visible) return {R(0), R(0), R(0)};
  R cap;
  const R x = scores.template score<kSet>(product, i, j, cap);
  if (x == -kInfinity<R>) return {R(0), R(0), R(0)};
  const R p = scores.weight(x, lse);
  const R ds = p * (dp * kept - delta);
  return {p * kept, ds * cap, ds};
}

// kept of a pair: 1 without dropout.
template <class R>
struct KeptScale {
  R scale;
  bool dropout;
  TFORMER_DEVICE explicit KeptScale(const AttentionParams& p)
      : scale(static_cast<R>(p.dropout_p > 0 ? dropout_scale(p.dropout_p) : 1)), dropout(p.dropout_p > 0) {}
};

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

template <class R, int kRows, int kColumns>
TFORMER_DEVICE void multiply_all(R (&x)[kRows][kColumns], R by) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[r][c] *= by;
  }
}

}  // namespace tformer::gpu
