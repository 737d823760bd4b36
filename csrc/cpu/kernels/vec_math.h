// exp and tanh of a vector. Polynomials: Chebyshev interpolation, maximal relative error in the comment.
#pragma once

#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class T>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  // 2^f, |f| <= 1/2: 2.5e-9
  static constexpr float kExp2[] = {1.0f,           0.693147207f,   0.240226509f,   0.0555032723f,
                                    0.00961805668f, 0.00134004282f, 0.000154614447f};
  // (tanh(x) / x - 1) / x^2 in z = x^2 <= 0.4: 2.1e-10
  static constexpr float kTanh[] = {-0.333333333f,   0.133333316f,   -0.0539675703f,  0.0218590592f,
                                    -0.00878649278f, 0.00329513372f, -0.000852027759f};
};

template <>
struct MathConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLog2e = 1.4426950408889634, kLog2eRest = 2.0355273740931033e-17;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  // 2^f, |f| <= 1/2: 5.6e-20
  static constexpr double kExp2[] = {1.0,
                                     0.693147180559945308,
                                     0.240226506959100712,
                                     0.055504108664821699,
                                     0.00961812910762848305,
                                     0.00133335581463903528,
                                     0.000154035303933627553,
                                     0.0000152527338562934664,
                                     1.3215486815999977e-6,
                                     1.0178051192960649e-7,
                                     7.05489438634834804e-9,
                                     4.45667534104920588e-10,
                                     2.57335683087568912e-11};
  // (tanh(x) / x - 1) / x^2 in z = x^2 <= 0.4: 5.8e-19
  static constexpr double kTanh[] = {-0.333333333333333333,    0.13333333333333317,       -0.0539682539682310266,
                                     0.0218694885348877575,    -0.00886323549344145084,   0.00359212741069531618,
                                     -0.0014558274668454266,   0.00058997591921439729,    -0.000238864647885499514,
                                     0.0000959723631816051307, -0.0000369605223033382571, 0.0000120886872262168983,
                                     -2.38557931117042516e-6};
};

template <class T, int kCount>
TFORMER_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[kCount]) {
  Vec<T> y = splat(c[kCount - 1]);
#pragma GCC unroll 16
  for (int i = kCount - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// The power of two that times_power takes for 0.
#if defined(__AVX512F__)
template <class T>
constexpr T kLowestPower = -2 * MathConstants<T>::kBias;
#else
template <class T>
constexpr T kLowestPower = -MathConstants<T>::kBias;
#endif

// p 2^n, where n = shifted - kRound is a whole number, not below kLowestPower. NaN stays NaN.
template <class T>
TFORMER_INLINE Vec<T> times_power(Vec<T> p, Vec<T> shifted) {
  using M = MathConstants<T>;
#if defined(__AVX512F__)
  const Vec<T> n = shifted - M::kRound;
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_scalef_ps((__m512)p, (__m512)n);
  } else {
    return (Vec<T>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
  }
#else
  return p * (Vec<T>)(((Vec<Integer<T>>)shifted + M::kBias) << M::kMantissa);
#endif
}

// e^x, for x <= 88 (709 for double). 0 for -inf; NaN stays NaN. The product x log2 e is exact up to n where
// multiply-adds are fused, so that the fraction does not carry the rounding of a large x (Cody & Waite 1980).
template <class T>
TFORMER_INLINE Vec<T> exp_vec(Vec<T> x) {
  using M = MathConstants<T>;
  x = maximum(splat(static_cast<T>(kLowestPower<T> * 0.693147180559945309)), x);
  const Vec<T> shifted = x * M::kLog2e + M::kRound;
  const Vec<T> fraction = x * M::kLog2eRest + (x * M::kLog2e - (shifted - M::kRound));
  return times_power<T>(polynomial<T>(fraction, M::kExp2), shifted);
}

// tanh(x): the odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, and that formula elsewhere.
template <class T>
TFORMER_INLINE Vec<T> tanh_vec(Vec<T> x) {
  using M = MathConstants<T>;
  const Vec<T> z = x * x;
  const Vec<T> near = x + x * z * polynomial<T>(z, M::kTanh);
  const Vec<T> limit = splat(static_cast<T>(20));
  const Vec<T> magnitude = (x < 0) ? -x : x;
  const Vec<T> clamped = (magnitude > limit) ? limit : magnitude;
  const Vec<T> far = 1 - 2 / (exp_vec<T>(clamped * 2) + 1);
  return (z < static_cast<T>(0.4)) ? near : ((x < 0) ? -far : far);
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
