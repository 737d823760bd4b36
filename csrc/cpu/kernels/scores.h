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

// f(pointer to element `offset` of a floating operand).
template <class F>
TFORMER_INLINE auto at_element(const ScoreOperand& t, int64_t offset, F&& f) {
  switch (t.dtype) {
    case DType::f64:
      return f(static_cast<const double*>(t.data) + offset);
    case DType::bf16:
      return f(static_cast<const bf16*>(t.data) + offset);
    case DType::f16:
      return f(static_cast<const f16*>(t.data) + offset);
    default:
      return f(static_cast<const float*>(t.data) + offset);
  }
}

// The logit of head h that has no value.
template <class Real>
Real sink_of(const AttentionParams& p, int64_t h) {
  const ScoreOperand sinks{p.sinks, p.sinks_dtype, {0, 0, 0, 1}};
  return at_element(sinks, h, [](const auto* logit) { return load_as<Real>(logit, 1)[0]; });
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
  bool by_keys;      // or a mask that is the same for all queries

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
    by_keys = scale_waits && (!mask || p.mask.stride[2] == 0);
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

  // Whether a mask that is the same for all queries hides any of the keys [from, from + n); which ones it shows.
  template <class Lane>
  TFORMER_INLINE bool hides_keys(int64_t from, int64_t n, Lane* visible) const {
    const int64_t keys = range.Sk - from < n ? range.Sk - from : n;
    const char* keys_mask = mask + from * p.mask.stride[3];
    Lane all = 1;
    if (p.mask.stride[3] == 1) {  // apart, so that the compiler makes vectors of it
      for (int64_t j = 0; j < keys; ++j) visible[j] = keys_mask[j], all &= keys_mask[j];
    } else {
      for (int64_t j = 0; j < keys; ++j) visible[j] = keys_mask[j * p.mask.stride[3]], all &= visible[j];
    }
    for (int64_t j = keys; j < n; ++j) visible[j] = 0;
    return !all;
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
  void add_operands(Real* s, int64_t i, int64_t key0, int64_t n, Real* slope_of_cap) const {
    if (p.softcap != 0) cap(s, n, slope_of_cap);
    if (!p.bias.data) return add_operands(s, i, key0, n, static_cast<const Real*>(nullptr));
    const int64_t offset = bias_offset + i * p.bias.stride[2] + key0 * p.bias.stride[3];
    at_element(p.bias, offset, [&](const auto* bias) TFORMER_LAMBDA { add_operands(s, i, key0, n, bias); });
  }

  __attribute__((noinline)) void cap(Real* s, int64_t n, Real* slope_of_cap) const {
    constexpr int L = kLanes<Real>;
    const Real inner = static_cast<Real>(p.scale / p.softcap), outer = static_cast<Real>(p.softcap);
    for (int64_t j = 0; j < n; j += L) {
      const Vec<Real> t = tanh_vec<Real>(load(s + j) * inner);
      store(s + j, t * outer);
      if (slope_of_cap) store(slope_of_cap + j, 1 - t * t);
    }
  }

  template <class Bias>
  __attribute__((noinline)) void add_operands(Real* s, int64_t i, int64_t key0, int64_t n, const Bias* bias) const {
    constexpr int L = kLanes<Real>;
    // copies: a store could change the members
    const Real by = p.softcap != 0 || scale_waits ? Real(1) : scale, alibi = slope;
    const bool has_alibi = p.alibi_slopes;
    const int64_t keys = range.Sk - key0, bias_stride = p.bias.stride[3], mask_stride = p.mask.stride[3];
    const char* row_mask = mask ? mask + i * p.mask.stride[2] + key0 * mask_stride : nullptr;
    const Vec<Real> none = splat(-kInfinity<Real>);
    Vec<Real> place = lane_index<Real>() - static_cast<Real>(range.diagonal(i) - key0);  // from the diagonal
    for (int64_t j = 0; j < n; j += L) {
      Vec<Real> x = load(s + j) * by;
      if (bias) x += elements(bias + j * bias_stride, bias_stride, keys - j);
      if (has_alibi) {
        x -= alibi * maximum(place, -place);
        place += L;
      }
      if (row_mask) x = (visible(row_mask + j * mask_stride, mask_stride, keys - j) != 0) ? x : none;
      store(s + j, x);
    }
  }

  // As many elements as a vector has, or `count`, and then zeros.
  template <class V>
  static TFORMER_INLINE Vec<Real> elements(const V* from, int64_t stride, int64_t count) {
    constexpr int L = kLanes<Real>;
    if (stride == 1 && count >= L) return load_as<Real>(from);
    Vec<Real> x{};
    for (int64_t k = 0; k < L && k < count; ++k) x[k] = load_as<Real>(from + k * stride, 1)[0];
    return x;
  }

  // Likewise of a mask's, widened.
  using Lane = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  static TFORMER_INLINE Vec<Lane> visible(const char* from, int64_t stride, int64_t count) {
    constexpr int L = kLanes<Real>;
    VecN<int8_t, L> bytes{};
    if (stride == 1 && count >= L) {
      __builtin_memcpy(&bytes, from, L);
    } else {
      for (int64_t k = 0; k < L && k < count; ++k) bytes[k] = from[k * stride];
    }
    return __builtin_convertvector(bytes, Vec<Lane>);
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
