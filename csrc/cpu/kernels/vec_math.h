// exp, log and tanh of a vector. Polynomials: minimax or Chebyshev interpolation, maximal relative error beside them.
#pragma once

#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class T>
struct MathConstants;

template <class T>
constexpr T kLog2e = static_cast<T>(1.4426950408889634074);
template <class T>
constexpr T kLn2 = static_cast<T>(0.69314718055994530942);

template <>
struct MathConstants<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  // 2^f, |f| <= 1/2: 9.2e-8, and 2.9e-6 for what is rounded to 16 bits; exactly 1 at 0
  static constexpr float kExp2[] = {1.0f, 0.693146978f, 0.240222421f, 0.0555073377f, 0.00967151278f, 0.00132647151f};
  static constexpr float kExp2For16Bits[] = {1.0f, 0.693124193f, 0.240240988f, 0.0559064256f, 0.00958284338f};
  // 2^f, 0 <= f <= 1: 9.4e-8, and 3.0e-6 for what is rounded to 16 bits; exactly 1 at 0
  static constexpr float kExp2OfFraction[] = {1.0f,          0.693151295f,   0.240164444f,
                                              0.0557999127f, 0.00901703071f, 0.00186713005f};
  static constexpr float kExp2OfFractionFor16Bits[] = {1.0f, 0.693044722f, 0.241280645f, 0.0522420481f, 0.0134268114f};
  // (tanh(x) / x - 1) / x^2 in z = x^2 <= 0.4: 2.1e-10
  static constexpr float kTanh[] = {-0.333333333f,   0.133333316f,   -0.0539675703f,  0.0218590592f,
                                    -0.00878649278f, 0.00329513372f, -0.000852027759f};
};

template <>
struct MathConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
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

// 2^x, for x <= 127 (1023 for double). 0 for -inf; NaN stays NaN. The rounding error of a large x shows in the result,
// but only where 2^x is small. kFor16Bits: results are rounded to a 16-bit type in the end.
template <class T, bool kFor16Bits = false>
TFORMER_INLINE Vec<T> exp2_vec(Vec<T> x) {
  using M = MathConstants<T>;
  const auto power_of_fraction = [](Vec<T> f) TFORMER_LAMBDA {
    if constexpr (kFor16Bits) {
      return polynomial<T>(f, M::kExp2For16Bits);
    } else {
      return polynomial<T>(f, M::kExp2);
    }
  };
#if defined(__AVX512F__)
  if constexpr (kFor16Bits) {
    return times_power(polynomial<T>(fraction(x), M::kExp2OfFractionFor16Bits), x);
  } else if constexpr (sizeof(T) == 4) {
    return times_power(polynomial<T>(fraction(x), M::kExp2OfFraction), x);
  } else {
    const Vec<T> n = round_whole(x);
    return times_power(power_of_fraction(x - n), n);  // NaN 2^-inf is 0
  }
#else
  x = maximum(splat(static_cast<T>(-M::kBias)), x);
  const Vec<T> shifted = x + M::kRound;
  const Vec<T> power = (Vec<T>)(((Vec<Integer<T>>)shifted + M::kBias) << M::kMantissa);
  return power_of_fraction(x - (shifted - M::kRound)) * power;
#endif
}

// e^x likewise.
template <class T>
TFORMER_INLINE Vec<T> exp_vec(Vec<T> x) {
  return exp2_vec<T>(x * kLog2e<T>);
}

// log(x) of a normal x > 0: from the exponent and a parabola through the fraction (error below 0.0054), each step of
// Halley's method for e^y = x leaves a twelfth of the third power of the error.
template <class T>
TFORMER_INLINE Vec<T> log_vec(Vec<T> x) {
  using M = MathConstants<T>;
  using I = Vec<Integer<T>>;
  const Vec<T> one = splat(T(1));
  const Vec<T> fraction = (Vec<T>)(((I)x & ((Integer<T>(1) << M::kMantissa) - 1)) | (I)one) - 1;
  const Vec<T> exponent = __builtin_convertvector(((I)x >> M::kMantissa) - M::kBias, Vec<T>);
  Vec<T> y = (exponent + fraction + static_cast<T>(0.347) * fraction * (1 - fraction)) * kLn2<T>;
  for (size_t n = 0; n < sizeof(T) / 4; ++n) {
    const Vec<T> e = exp_vec<T>(y);
    y += 2 * (x - e) / (x + e);
  }
  return y;
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
