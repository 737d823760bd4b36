// From products q.k to scores, from scores to weights; dropout. All kernels of both directions call this.
#pragma once

#include "../key_range.h"
#include "../philox.h"
#include "attention_tiles.h"

namespace tformer::gpu {

template <class R>
constexpr R kInfinity = static_cast<R>(__builtin_inf());

// Weights of 16-bit elements are powers of 2 (one instruction), those of float and double of e.
template <class T>
struct Exponent {
  static constexpr float kUnit = 1.4426950408889634f;  // of e^x = 2^(x kUnit)
  static TFORMER_DEVICE float power(float x) { return exp2_fast(x); }
  static TFORMER_DEVICE float of(float x) { return log2(x); }
  static TFORMER_DEVICE float natural(float x) { return x * 0.6931471805599453f; }
};
template <>
struct Exponent<float> {
  static constexpr float kUnit = 1;
  static TFORMER_DEVICE float power(float x) { return exp(x); }
  static TFORMER_DEVICE float of(float x) { return log(x); }
  static TFORMER_DEVICE float natural(float x) { return x; }
};
template <>
struct Exponent<double> {
  static constexpr double kUnit = 1;
  static TFORMER_DEVICE double power(double x) { return exp(x); }
  static TFORMER_DEVICE double of(double x) { return log(x); }
  static TFORMER_DEVICE double natural(double x) { return x; }
};

// An element of any floating dtype.
template <class R>
TFORMER_DEVICE R read_element(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f64:
      return static_cast<R>(static_cast<const double*>(data)[at]);
    case DType::bf16:
      return static_cast<R>(widen(static_cast<const bf16*>(data)[at]));
    case DType::f16:
      return static_cast<R>(widen(static_cast<const f16*>(data)[at]));
    default:
      return static_cast<R>(static_cast<const float*>(data)[at]);
  }
}

// The scores of one (batch, query head). kPlain: nothing but the scale and the range of keys; products are then scores
// but for a factor, which waits for the exponent.
template <class T, bool kPlain>
struct Scores {
  using R = Real<T>;
  const AttentionParams& p;
  KeyRange range;
  int64_t Sq;
  R scale, inner;  // inner: of what tanh is taken
  R slope;         // of ALiBi
  R unit;          // positive; score * unit is the exponent
  int64_t bias_offset, mask_offset;

  TFORMER_DEVICE Scores(const AttentionParams& params, const Sequence& s, int64_t b, int64_t h)
      : p(params),
        range(params, s),
        Sq(s.Sq),
        scale(static_cast<R>(params.scale)),
        inner(static_cast<R>(params.softcap != 0 ? params.scale / params.softcap : 0)),
        slope(params.alibi_slopes
                  ? static_cast<R>(params.alibi_slopes[b * params.alibi_stride[0] + h * params.alibi_stride[1]])
                  : 0),
        unit(kPlain ? scale * Exponent<T>::kUnit : Exponent<T>::kUnit),
        bias_offset(b * params.bias.stride[0] + h * params.bias.stride[1]),
        mask_offset(b * params.mask.stride[0] + h * params.mask.stride[1]) {}

  // Whether every query of [i0, i1) sees every key of [j0, j1).
  TFORMER_DEVICE bool all_visible(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    return i1 <= Sq && range.begin(i1 - 1) <= j0 && range.end(i0) >= j1;
  }

  // The score of query i and key j, which position lets through; -inf where it takes no part. `cap` receives the
  // derivative of the softcap.
  TFORMER_DEVICE R score(R product, int64_t i, int64_t j, R& cap) const {
    cap = 1;
    if constexpr (kPlain) {
      return product;
    } else {
      R x = product * scale;
      if (p.softcap != 0) {
        const R t = tanh(product * inner);
        x = static_cast<R>(p.softcap) * t;
        cap = 1 - t * t;
      }
      if (p.bias.data) {
        x += read_element<R>(p.bias.data, p.bias.dtype, bias_offset + i * p.bias.stride[2] + j * p.bias.stride[3]);
      }
      if (p.alibi_slopes) x -= slope * absolute(static_cast<R>(range.diagonal(i) - j));
      if (p.mask.data) {
        const auto* mask = static_cast<const char*>(p.mask.data) + mask_offset;
        if (!mask[i * p.mask.stride[2] + j * p.mask.stride[3]]) x = -kInfinity<R>;
      }
      return x;
    }
  }
};

template <class R>
TFORMER_DEVICE R sink_of(const AttentionParams& p, int64_t h) {
  return read_element<R>(p.sinks, p.sinks_dtype, h);
}

// lse of a row as the exponent that its scores are held against; a row without a visible key has no weights.
template <class T>
TFORMER_DEVICE Real<T> exponent_of_lse(Real<T> lse) {
  return lse == -kInfinity<Real<T>> ? kInfinity<Real<T>> : lse * Exponent<T>::kUnit;
}

// Softmax of rows as they grow: weight = e^(x - m), l = sum of the weights (Milakov & Gimelshein 2018). m is held as an
// exponent; l is this lane's part until sum_lanes.
template <class T, int kLaneRows>
struct OnlineSoftmax {
  using R = Real<T>;
  R m[kLaneRows], l[kLaneRows];

  TFORMER_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) m[r] = -kInfinity<R>, l[r] = 0;
  }

  // Scores become weights; o, what was summed before, is brought to the new maximum.
  template <int kC, int kO>
  TFORMER_DEVICE void update(R (&s)[kLaneRows][kC], R unit, R (&o)[kLaneRows][kO]) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      R top = s[r][0];
#pragma unroll
      for (int c = 1; c < kC; ++c) top = maximum(top, s[r][c]);
      const R m_new = maximum(m[r], quad_maximum(top) * unit);
      const R shift = m_new == -kInfinity<R> ? R(0) : m_new;  // nothing visible yet: weights are e^-inf = 0
      const R rescale = Exponent<T>::power(m[r] - shift);
      R sum = 0;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        s[r][c] = Exponent<T>::power(fma(s[r][c], unit, -shift));
        sum += s[r][c];
      }
      l[r] = l[r] * rescale + sum;
      m[r] = m_new;
#pragma unroll
      for (int d = 0; d < kO; ++d) o[r][d] *= rescale;
    }
  }

  TFORMER_DEVICE void sum_lanes() {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) l[r] = quad_sum(l[r]);
  }

  // One more score that has no value: it only takes weight. Returns by what o is to be multiplied.
  TFORMER_DEVICE R add_sink(int r, R logit) {
    const R x = logit * Exponent<T>::kUnit, m_new = maximum(m[r], x);
    const R rescale = m[r] == m_new ? R(1) : Exponent<T>::power(m[r] - m_new);
    l[r] = l[r] * rescale + (x == -kInfinity<R> ? R(0) : Exponent<T>::power(x - m_new));
    m[r] = m_new;
    return rescale;
  }

  TFORMER_DEVICE bool dead(int r) const { return l[r] == 0; }
  TFORMER_DEVICE R lse(int r) const {
    return dead(r) ? -kInfinity<R> : Exponent<T>::natural(m[r] + Exponent<T>::of(l[r]));
  }
};

}  // namespace tformer::gpu
