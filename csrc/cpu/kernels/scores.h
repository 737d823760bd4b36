// From products q.k to the scores the softmax sees: scale, softcap, bias, ALiBi, masks. Both directions call this.
#pragma once

#include "../../key_range.h"
#include "dropout.h"
#include "packing.h"
#include "vec_math.h"

namespace tformer::TFORMER_ISA {
namespace {

// Keys are handled in blocks of this many: a whole number of panels on every ISA, and one Philox block.
constexpr int64_t kKeyBlock = 64;

template <class Real>
constexpr Real kInfinity = static_cast<Real>(__builtin_inf());

// Element j of a row of any floating dtype.
template <class Real>
void read_row(const ScoreOperand& t, const char* row, int64_t n, Real* out) {
  const int64_t stride = t.stride[3];
  switch (t.dtype) {
    case DType::f32:
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<Real>(reinterpret_cast<const float*>(row)[j * stride]);
      break;
    case DType::f64:
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<Real>(reinterpret_cast<const double*>(row)[j * stride]);
      break;
    case DType::bf16:
      for (int64_t j = 0; j < n; ++j) {
        out[j] = load_as<Real>(reinterpret_cast<const bf16*>(row) + j * stride, 1)[0];
      }
      break;
    case DType::f16:
      for (int64_t j = 0; j < n; ++j) {
        out[j] = load_as<Real>(reinterpret_cast<const f16*>(row) + j * stride, 1)[0];
      }
      break;
    case DType::boolean:
      break;
  }
}

// The scores of one (batch, query head): what its rows share.
template <class Real>
struct Scores {
  const AttentionParams& p;
  KeyRange range;
  Real scale;
  Real slope;  // of ALiBi
  const char* bias;
  const char* mask;
  bool plain;  // nothing but the scale and the range of keys

  Scores(const AttentionParams& params, const Sequence& s, int64_t b, int64_t h)
      : p(params), range(params, s), scale(static_cast<Real>(params.scale)), slope(0), bias(nullptr), mask(nullptr) {
    if (p.alibi_slopes) {
      slope = static_cast<Real>(p.alibi_slopes[b * p.alibi_stride[0] + h * p.alibi_stride[1]]);
    }
    if (p.bias.data) bias = at(p.bias, b * p.bias.stride[0] + h * p.bias.stride[1]);
    if (p.mask.data) mask = at(p.mask, b * p.mask.stride[0] + h * p.mask.stride[1]);
    plain = p.softcap == 0 && !p.alibi_slopes && !bias && !mask && scale > 0;
  }

  static const char* at(const ScoreOperand& t, int64_t offset) {
    const int64_t bytes = t.dtype == DType::f64 ? 8 : t.dtype == DType::f32 ? 4 : t.dtype == DType::boolean ? 1 : 2;
    return static_cast<const char*>(t.data) + offset * bytes;
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
      for (int64_t j = j0; j < j1; ++j) {
        if (row[j * p.mask.stride[3]]) return true;
      }
    }
    return false;
  }

  // s[0, n): products of query i with keys key0 ..; n a whole number of vectors. Turns them into scores, up to a
  // positive factor that is returned: applying it is free in the exponent that follows. Hidden keys become -inf.
  // Where `slope_of_cap` is given it receives the derivative of the softcap.
  Real finish_row(Real* s, int64_t i, int64_t key0, int64_t n, Real* slope_of_cap) const {
    const int64_t begin = range.begin(i) - key0, end = range.end(i) - key0;
    Real left = scale;
    if (!plain) {
      left = 1;
      scale_and_cap(s, n, slope_of_cap);
      const int64_t keys = range.Sk - key0 < n ? range.Sk - key0 : n;
      if (bias) add_bias(s, i, key0, keys);
      if (p.alibi_slopes) add_alibi(s, range.diagonal(i) - key0, n);
      if (mask) {
        const char* row = mask + i * p.mask.stride[2] + key0 * p.mask.stride[3];
        for (int64_t j = 0; j < keys; ++j) s[j] = row[j * p.mask.stride[3]] ? s[j] : -kInfinity<Real>;
      }
    }
    for (int64_t j = 0; j < begin && j < n; ++j) s[j] = -kInfinity<Real>;
    for (int64_t j = end > 0 ? end : 0; j < n; ++j) s[j] = -kInfinity<Real>;
    return left;
  }

 private:
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

  TFORMER_INLINE void add_bias(Real* s, int64_t i, int64_t key0, int64_t keys) const {
    const int64_t size = p.bias.dtype == DType::f64 ? 8 : p.bias.dtype == DType::f32 ? 4 : 2;
    Real row[kKeyBlock];
    for (int64_t j = 0; j < keys; j += kKeyBlock) {
      const int64_t count = keys - j < kKeyBlock ? keys - j : kKeyBlock;
      read_row<Real>(p.bias, bias + (i * p.bias.stride[2] + (key0 + j) * p.bias.stride[3]) * size, count, row);
      for (int64_t c = 0; c < count; ++c) s[j + c] += row[c];
    }
  }

  TFORMER_INLINE void add_alibi(Real* s, int64_t diagonal, int64_t n) const {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t distance = diagonal < j ? j - diagonal : diagonal - j;
      s[j] -= slope * static_cast<Real>(distance);
    }
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
