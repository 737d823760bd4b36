// From products q.k to the scores the softmax sees: scale, softcap, bias, ALiBi, masks. Both directions call this.
#pragma once

#include "../../key_range.h"
#include "dropout.h"
#include "online_softmax.h"

namespace tformer::TFORMER_ISA {
namespace {

// Keys are handled in blocks of this many: a whole number of panels on every ISA, and one Philox block.
constexpr int64_t kKeyBlock = 64;

template <class V>
TFORMER_INLINE V* row_of(const Rows& r, int64_t b, int64_t h, int64_t i) {
  return static_cast<V*>(r.data) + b * r.stride[0] + h * r.stride[1] + i * r.stride[2];
}

template <class Real, class T>
TFORMER_INLINE void add_elements(const T* row, int64_t stride, int64_t n, Real scale, Real* to) {
  constexpr int L = kLanes<Real>;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + L <= n; j += L) store(to + j, load(to + j) * scale + load_as<Real>(row + j));
  }
  for (; j < n; ++j) to[j] = to[j] * scale + load_as<Real>(row + j * stride, 1)[0];
}

// to = scale to + n elements of any floating dtype, from the one at `offset`, each t.stride[3] after the other.
template <class Real>
void add_row(const ScoreOperand& t, int64_t offset, int64_t n, Real scale, Real* to) {
  switch (t.dtype) {
    case DType::f32:
      return add_elements<Real>(static_cast<const float*>(t.data) + offset, t.stride[3], n, scale, to);
    case DType::f64:
      return add_elements<Real>(static_cast<const double*>(t.data) + offset, t.stride[3], n, scale, to);
    case DType::bf16:
      return add_elements<Real>(static_cast<const bf16*>(t.data) + offset, t.stride[3], n, scale, to);
    case DType::f16:
      return add_elements<Real>(static_cast<const f16*>(t.data) + offset, t.stride[3], n, scale, to);
    case DType::boolean:
      return;
  }
}

// The logit of head h that has no value.
template <class Real>
Real sink_of(const AttentionParams& p, int64_t h) {
  Real logit = 0;
  add_row<Real>(ScoreOperand{p.sinks, p.sinks_dtype, {0, 0, 0, 1}}, h, 1, 1, &logit);
  return logit;
}

// The scores of one (batch, query head): what its rows share.
template <class Real>
struct Scores {
  const AttentionParams& p;
  KeyRange range;
  Real scale;
  Real slope;           // of ALiBi
  int64_t bias_offset;  // of this head
  const char* mask;
  bool scale_waits;  // nothing is added to the scaled products
  bool plain;        // nothing but the scale and the range of keys

  Scores(const AttentionParams& params, const Sequence& s, int64_t b, int64_t h)
      : p(params),
        range(params, s),
        scale(static_cast<Real>(params.scale)),
        slope(0),
        bias_offset(b * params.bias.stride[0] + h * params.bias.stride[1]),
        mask(nullptr) {
    if (p.alibi_slopes) {
      slope = static_cast<Real>(p.alibi_slopes[b * p.alibi_stride[0] + h * p.alibi_stride[1]]);
    }
    if (p.mask.data) mask = static_cast<const char*>(p.mask.data) + b * p.mask.stride[0] + h * p.mask.stride[1];
    scale_waits = p.softcap == 0 && !p.alibi_slopes && !p.bias.data && scale > 0;
    plain = scale_waits && !mask;
  }

  // Whether any of the rows [i0, i1) may attend to a key of [j0, j1).
  bool any_visible(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    const int64_t begin = range.begin(i0), end = range.end(i1 - 1);
    if (j0 < begin) j0 = begin;
    if (j1 > end) j1 = end;
    if (j0 >= j1) return false;
    if (!mask) return true;
    if (p.mask.stride[2] == 0) i1 = i0 + 1;
    for (int64_t i = i0; i < i1; ++i) {
      const char* row = mask + i * p.mask.stride[2];
      char seen = 0;
      if (p.mask.stride[3] == 1) {  // apart, so that the compiler makes vectors of it
        for (int64_t j = j0; j < j1; ++j) seen |= row[j];
      } else {
        for (int64_t j = j0; j < j1; ++j) seen |= row[j * p.mask.stride[3]];
      }
      if (seen) return true;
    }
    return false;
  }

  // s[0, n): products of query i with keys key0 ..; n a whole number of vectors. Turns them into scores divided by
  // pending_scale(). Hidden keys become -inf. Where `slope_of_cap` is given it receives the derivative of the softcap.
  TFORMER_INLINE void finish_row(Real* s, int64_t i, int64_t key0, int64_t n, Real* slope_of_cap) const {
    constexpr int L = kLanes<Real>;
    if (!plain) add_operands(s, i, key0, n, slope_of_cap);
    const int64_t begin = range.begin(i) - key0, end = range.end(i) - key0;
    const Vec<Real> lane = lane_index<Real>(), none = splat(-kInfinity<Real>);
    for (int64_t j = 0; j < begin && j < n; j += L) {
      store(s + j, (lane < static_cast<Real>(begin - j)) ? none : load(s + j));
    }
    for (int64_t j = end > 0 ? end / L * L : 0; j < n; j += L) {
      store(s + j, (lane < static_cast<Real>(end - j)) ? load(s + j) : none);
    }
  }

  // Positive. Where nothing is added to the scaled products the scale waits for the exponent, in which it is free.
  Real pending_scale() const { return scale_waits ? scale : Real(1); }

 private:
  __attribute__((noinline)) void add_operands(Real* s, int64_t i, int64_t key0, int64_t n, Real* slope_of_cap) const {
    const bool scale_with_bias = p.bias.data && p.softcap == 0;
    if (!scale_waits && !scale_with_bias) scale_and_cap(s, n, slope_of_cap);
    const int64_t keys = range.Sk - key0 < n ? range.Sk - key0 : n;
    if (p.bias.data) {
      const int64_t offset = bias_offset + i * p.bias.stride[2] + key0 * p.bias.stride[3];
      add_row<Real>(p.bias, offset, keys, scale_with_bias ? scale : Real(1), s);
    }
    if (p.alibi_slopes) add_alibi(s, range.diagonal(i) - key0, n);
    if (!mask) return;
    const char* row = mask + i * p.mask.stride[2] + key0 * p.mask.stride[3];
    if (p.mask.stride[3] == 1) {  // apart, so that the compiler makes vectors of it
      for (int64_t j = 0; j < keys; ++j) s[j] = row[j] ? s[j] : -kInfinity<Real>;
    } else {
      for (int64_t j = 0; j < keys; ++j) s[j] = row[j * p.mask.stride[3]] ? s[j] : -kInfinity<Real>;
    }
  }

  TFORMER_INLINE void scale_and_cap(Real* s, int64_t n, Real* slope_of_cap) const {
    constexpr int L = kLanes<Real>;
    if (p.softcap == 0) {
      for (int64_t j = 0; j < n; j += L) store(s + j, load(s + j) * scale);
      return;
    }
    const Real inner = static_cast<Real>(p.scale / p.softcap), outer = static_cast<Real>(p.softcap);
    for (int64_t j = 0; j < n; j += L) {
      const Vec<Real> t = tanh_vec<Real>(load(s + j) * inner);
      store(s + j, t * outer);
      if (slope_of_cap) store(slope_of_cap + j, 1 - t * t);
    }
  }

  TFORMER_INLINE void add_alibi(Real* s, int64_t diagonal, int64_t n) const {
    constexpr int L = kLanes<Real>;
    const Vec<Real> lane = lane_index<Real>();
    for (int64_t j = 0; j < n; j += L) {
      const Vec<Real> distance = lane + static_cast<Real>(j - diagonal);
      store(s + j, load(s + j) - slope * maximum(distance, -distance));
    }
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
