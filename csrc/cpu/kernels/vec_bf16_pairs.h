// Two vectors of bf16 as even and odd elements, so that one cheap instruction widens a vector and no element changes
// lanes: the even ones are the lower halves of 32-bit lanes, the odd ones the upper halves.
#pragma once

#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

using HalfPair = VecN<uint16_t, 2 * kLanes<float>>;

TFORMER_INLINE void widen_even_odd(HalfPair pair, F& even, F& odd) {
  even = (F)((U32)pair << 16), odd = (F)((U32)pair & 0xffff0000u);
}

// The bits of a number that is no NaN, whose upper half is the nearest bf16, ties to even.
TFORMER_INLINE U32 round_to_bf16(F x) {
  const U32 u = (U32)x;
#if defined(__AVX512F__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(1 << 16));
  const __m512i t = _mm512_add_epi32((__m512i)u, _mm512_set1_epi32(0x7fff));
  return (U32)_mm512_mask_add_epi32(t, odd, t, _mm512_set1_epi32(1));
#else
  return u + 0x7fff + ((u >> 16) & 1);
#endif
}

// Whether a lane of a or of b is NaN; true where asking would cost more than it saves.
TFORMER_INLINE bool any_nan(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#elif defined(__ARM_NEON)
  return any_lane((a != a) | (b != b));
#else
  (void)a, (void)b;
  return true;
#endif
}

// kPairs times the nearest bf16 of x[2 n] (even) and x[2 n + 1] (odd), as they lie in memory.
template <int kPairs>
TFORMER_INLINE void narrow_even_odd(const F (&x)[2 * kPairs], HalfPair (&to)[kPairs]) {
#if TFORMER_HAS_BF16_PRODUCTS && defined(__ARM_NEON)
  for (int n = 0; n < kPairs; ++n) {
    const auto even = (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)x[2 * n]);
    const auto odd = (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)x[2 * n + 1]);
    to[n] = (HalfPair)vzip1q_u16(even, odd);
  }
  return;
#elif TFORMER_HAS_BF16_PRODUCTS
  // The CPU's own narrowing gives 0 for subnormal numbers. So what has no 0 in it had none: one test for two vectors.
  __mmask32 zero[kPairs], any_zero = 0;
  for (int n = 0; n < kPairs; ++n) {
    to[n] = (HalfPair)_mm512_cvtne2ps_pbh((__m512)x[2 * n + 1], (__m512)x[2 * n]);
    zero[n] = _mm512_testn_epi16_mask((__m512i)to[n], _mm512_set1_epi16(0x7fff));
    any_zero |= zero[n];
  }
  bool subnormal = false;
  if (__builtin_expect(any_zero != 0, 0)) {
    constexpr int kSubnormal = 0x20;
    for (int n = 0; n < 2 * kPairs; ++n) subnormal |= _mm512_fpclass_ps_mask((__m512)x[n], kSubnormal) != 0;
  }
  if (__builtin_expect(!subnormal, 1)) {
    const HalfPair i = lane_index<uint16_t>(), interleaved = (i >> 1) | (i & 1) << 4;
    for (int n = 0; n < kPairs; ++n) to[n] = (HalfPair)_mm512_permutexvar_epi16((__m512i)interleaved, (__m512i)to[n]);
    return;
  }
#endif
  bool nan = false;
  for (int n = 0; n < kPairs; ++n) nan |= any_nan(x[2 * n], x[2 * n + 1]);
  if (__builtin_expect(nan, 0)) {
    for (int n = 0; n < kPairs; ++n) to[n] = (HalfPair)(narrow_bf16(x[2 * n]) | narrow_bf16(x[2 * n + 1]) << 16);
    return;
  }
  for (int n = 0; n < kPairs; ++n) {
    to[n] = (HalfPair)(round_to_bf16(x[2 * n]) >> 16 | (round_to_bf16(x[2 * n + 1]) & 0xffff0000u));
  }
}

template <int... i>
TFORMER_INLINE void split_even_odd(F& a, F& b, std::integer_sequence<int, i...>) {
  const F even = __builtin_shufflevector(a, b, 2 * i...), odd = __builtin_shufflevector(a, b, (2 * i + 1)...);
  a = even, b = odd;
}
template <int... i>
TFORMER_INLINE void merge_even_odd(F& even, F& odd, std::integer_sequence<int, i...>) {
  constexpr int L = sizeof...(i);
  const F first = __builtin_shufflevector(even, odd, (i / 2 + i % 2 * L)...);
  odd = __builtin_shufflevector(even, odd, (i / 2 + i % 2 * L + L / 2)...);
  even = first;
}
// Two vectors in the order of memory to even and odd elements, and back.
TFORMER_INLINE void split_even_odd(F& a, F& b) {
  split_even_odd(a, b, std::make_integer_sequence<int, kLanes<float>>{});
}
TFORMER_INLINE void merge_even_odd(F& a, F& b) {
  merge_even_odd(a, b, std::make_integer_sequence<int, kLanes<float>>{});
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
