// Single rows of results, a warp at a time and key by key: the way that leaves hidden pairs out one by one, for rows
// whose products met NaN or infinity. Sixty times slower than tiles; a tensor without those never gets here.
#pragma once

#include "attention_dropout.h"
#include "attention_launch.h"
#include "attention_scores.h"

namespace tformer::gpu {

// A row spread over the lanes of a warp.
template <class T>
struct LaneRow {
  using R = Real<T>;
  static constexpr int kParts = kMostHeadDim / kWarp;
  R x[kParts];

  TFORMER_DEVICE LaneRow() {
#pragma unroll
    for (int n = 0; n < kParts; ++n) x[n] = 0;
  }
  TFORMER_DEVICE LaneRow(const T* from, int64_t width) {
#pragma unroll
    for (int n = 0; n < kParts; ++n) x[n] = lane() + n * kWarp < width ? widen(from[lane() + n * kWarp]) : R(0);
  }
  TFORMER_DEVICE R dot(const LaneRow& other) const {
    R sum = 0;
#pragma unroll
    for (int n = 0; n < kParts; ++n) sum = fma(x[n], other.x[n], sum);
    for (int step = kWarp / 2; step; step /= 2) sum += shuffle_xor(sum, step);
    return sum;
  }
  TFORMER_DEVICE void add(R by, const LaneRow& other) {
#pragma unroll
    for (int n = 0; n < kParts; ++n) x[n] = fma(by, other.x[n], x[n]);
  }
  TFORMER_DEVICE void scale(R by) {
#pragma unroll
    for (int n = 0; n < kParts; ++n) x[n] *= by;
  }
  template <class To>
  TFORMER_DEVICE void store(To* to, int64_t width) const {
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      if (lane() + n * kWarp < width) to[lane() + n * kWarp] = narrow<To>(x[n]);
    }
  }
};

template <class T, bool kPlain>
struct RowForward {
  using R = Real<T>;
  const Scores<T, kPlain>& scores;
  const AttentionParams& p;
  const Positions& seq;
  const int b, h, kv_head, i;
  const LaneRow<T> q;
  LaneRow<T> o;
  R m = -kInfinity<R>, l = 0;

  TFORMER_DEVICE RowForward(const Scores<T, kPlain>& scores_, const Positions& seq_, int b_, int h_, int i_)
      : scores(scores_),
        p(scores_.p),
        seq(seq_),
        b(b_),
        h(h_),
        kv_head(static_cast<int>(h_ / (p.Hq / p.Hk))),
        i(i_),
        q(row_at<const T>(p.q, b_, h_, seq_.q_begin + i_), p.D) {}

  TFORMER_DEVICE void add_key(int j) {
    const LaneRow<T> k(row_at<const T>(p.k, b, kv_head, seq.k_begin + j), p.D);
    R cap;
    const R x = scores.score(q.dot(k), i, j, cap);
    if (x == -kInfinity<R>) return;
    const R weight = add_weight(scores.natural(x));
    const LaneRow<T> v(row_at<const T>(p.v, b, kv_head, seq.k_begin + j), p.Dv);
    const bool kept = p.dropout_p <= 0 || is_kept(p, b, h, i, j);
    o.add(kept ? weight : R(0), v);
  }

  // Takes part in the sum of weights; returns its weight.
  TFORMER_DEVICE R add_weight(R x) {
    const R m_new = maximum(m, x);
    if (m_new != m) {
      const R rescale = Exponent<T>::power((m - m_new) * Exponent<T>::kUnit);
      l *= rescale;
      o.scale(rescale);
      m = m_new;
    }
    const R weight = Exponent<T>::power((x - (m == -kInfinity<R> ? R(0) : m)) * Exponent<T>::kUnit);
    l += weight;
    return weight;
  }

  template <class To>
  TFORMER_DEVICE void store(To* to) {
    const R kept = p.dropout_p > 0 ? static_cast<R>(dropout_scale(p.dropout_p)) : R(1);
    if (l != 0) o.scale(kept / l);
    o.store(to, p.Dv);
  }
};

// What one pair adds to gradients: p and ds of the formulas in attention_backward.h.
template <class R>
struct PairGradient {
  R p, ds;
};

template <class T, bool kPlain>
TFORMER_DEVICE bool pair_gradient(const Scores<T, kPlain>& scores, int b, int h, int i, int j, int row,
                                  const LaneRow<T>& q, const LaneRow<T>& k, const LaneRow<T>& grad_o,
                                  const LaneRow<T>& v, PairGradient<Real<T>>& out) {
  using R = Real<T>;
  const AttentionParams& p = scores.p;
  R cap;
  const R x = scores.score(q.dot(k), i, j, cap);
  R dp = grad_o.dot(v);
  if (x == -kInfinity<R>) return false;
  const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + row;
  out.p = scores.weight(x, scores.held_lse(static_cast<const R*>(p.lse)[at]));
  R kept = 1;
  if (p.dropout_p > 0) {
    kept = is_kept(p, b, h, i, j) ? static_cast<R>(dropout_scale(p.dropout_p)) : R(0);
  }
  out.ds = out.p * (dp * kept - static_cast<R>(p.delta[at])) * cap * scores.scale;
  out.p *= kept;
  return true;
}

// dq of one query.
template <class T, bool kPlain>
TFORMER_DEVICE void redo_grad_query(const AttentionParams& p, const Scores<T, kPlain>& scores, const Positions& seq,
                                    int b, int h, int kv_head, int i) {
  const LaneRow<T> query(row_at<const T>(p.q, b, h, seq.q_begin + i), p.D);
  const LaneRow<T> go(row_at<const T>(p.grad_o, b, h, seq.q_begin + i), p.Dv);
  LaneRow<T> dq;
  for (int j = scores.range.begin(i); j < scores.range.end(i); ++j) {
    const LaneRow<T> k(row_at<const T>(p.k, b, kv_head, seq.k_begin + j), p.D);
    const LaneRow<T> v(row_at<const T>(p.v, b, kv_head, seq.k_begin + j), p.Dv);
    PairGradient<Real<T>> g;
    if (pair_gradient(scores, b, h, i, j, seq.q_begin + i, query, k, go, v, g)) dq.add(g.ds, k);
  }
  dq.store(row_at<T>(p.grad_q, b, h, seq.q_begin + i), p.D);
}

// dk and dv of one key; `group` heads of queries share it.
template <class T, bool kPlain, bool kKeys, bool kValues>
TFORMER_DEVICE void redo_grad_key(const AttentionParams& p, const Positions& seq, int b, int kv_head, int group,
                                  int j) {
  const LaneRow<T> key(row_at<const T>(p.k, b, kv_head, seq.k_begin + j), p.D);
  const LaneRow<T> value(row_at<const T>(p.v, b, kv_head, seq.k_begin + j), p.Dv);
  LaneRow<T> dk, dv;
  for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const Scores<T, kPlain> scores(p, sequence_of(p, b), b, h);
    const int end = j < seq.Sk ? scores.range.query_end(j, seq.Sq) : 0;
    for (int i = scores.range.query_begin(j); i < end; ++i) {
      const LaneRow<T> q(row_at<const T>(p.q, b, h, seq.q_begin + i), p.D);
      const LaneRow<T> grad_o(row_at<const T>(p.grad_o, b, h, seq.q_begin + i), p.Dv);
      PairGradient<Real<T>> g;
      if (!pair_gradient(scores, b, h, i, j, seq.q_begin + i, q, key, grad_o, value, g)) continue;
      dv.add(g.p, grad_o);
      dk.add(g.ds, q);
    }
  }
  if (kKeys) dk.store(row_at<T>(p.grad_k, b, kv_head, seq.k_begin + j), p.D);
  if (kValues) dv.store(row_at<T>(p.grad_v, b, kv_head, seq.k_begin + j), p.Dv);
}

}  // namespace tformer::gpu
