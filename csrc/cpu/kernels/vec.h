// Vectors of the ISA this file is compiled for: GCC / clang vector extensions, plus the few operations that need an
// intrinsic. The algorithms in this folder are written once, for any width. Everything is in an anonymous namespace
// inside the ISA's own namespace, so that no symbol of a wider ISA can be linked into a narrower one.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define TFORMER_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TFORMER_VECTOR_BYTES 32
#else
#define TFORMER_VECTOR_BYTES 16
#endif

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TFORMER_HAS_BF16_PRODUCTS 1
#else
#define TFORMER_HAS_BF16_PRODUCTS 0
#endif

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TFORMER_HAS_BF16_BLOCKS 1
#else
#define TFORMER_HAS_BF16_BLOCKS 0
#endif

#if defined(__AMX_BF16__)
#define TFORMER_HAS_TILES 1
#else
#define TFORMER_HAS_TILES 0
#endif

namespace tformer::TFORMER_ISA {
namespace {

constexpr int kVectorBytes = TFORMER_VECTOR_BYTES;

// Register tile of a matrix product in vector registers: so many accumulators, with room left for one row of the second
// operand and one broadcast. 6 x 4 fills 29 of 32 registers, 6 x 2 fills 15 of 16.
constexpr int kVectorTileRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorTileColumns = 4;
#else
constexpr int kVectorTileColumns = 2;
#endif

// Whether a product and a sum are one instruction with one rounding.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFusesMultiplyAdd = true;
#else
constexpr bool kFusesMultiplyAdd = false;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VectorOf<T, kVectorBytes>::type;
template <class T, int kCount>
using VecN = typename VectorOf<T, kCount* static_cast<int>(sizeof(T))>::type;

// The integer of the same size, which is also the type of a comparison's lanes.
template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <class T>
using Integer = typename IntegerOf<T>::type;

#define TFORMER_INLINE inline __attribute__((always_inline))
#define TFORMER_LAMBDA __attribute__((always_inline))

template <class V, class T>
TFORMER_INLINE V load_bytes(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class T>
TFORMER_INLINE Vec<T> load(const T* p) {
  return load_bytes<Vec<T>>(p);
}
template <class T, class V>
TFORMER_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class T>
TFORMER_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <class V>
TFORMER_INLINE V maximum(V a, V b) {  // b where either is NaN
  return a > b ? a : b;
}
template <class T>
TFORMER_INLINE Vec<T> lane_index() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}
// combine(upper half, lower half) of the lanes, again and again, down to one.
template <class T, int kCount, class Combine>
TFORMER_INLINE T reduce_lanes(VecN<T, kCount> v, Combine combine) {
  if constexpr (kCount == 2) {
    return combine(v, __builtin_shufflevector(v, v, 1, 0))[0];
  } else {
    VecN<T, kCount / 2> half[2];
    std::memcpy(half, &v, sizeof(v));
    return reduce_lanes<T, kCount / 2>(combine(half[0], half[1]), combine);
  }
}
// Whether a comparison holds in some lane.
template <class M>
TFORMER_INLINE bool any_lane(M mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__ARM_NEON)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  using Lane = int64_t;
  return reduce_lanes<Lane, sizeof(M) / 8>((VecN<Lane, sizeof(M) / 8>)mask,
                                           [](auto a, auto b) TFORMER_LAMBDA { return a | b; }) != 0;
#endif
}
#if defined(__AVX512F__)
// A bit for each lane.
using LaneMask = uint16_t;
TFORMER_INLINE LaneMask greater(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
}
#endif
template <class T>
TFORMER_INLINE T sum_lanes(Vec<T> v) {
  return reduce_lanes<T, kLanes<T>>(v, [](auto a, auto b) TFORMER_LAMBDA { return a + b; });
}
template <class T>
TFORMER_INLINE T max_lanes(Vec<T> v) {
  return reduce_lanes<T, kLanes<T>>(v, [](auto a, auto b) TFORMER_LAMBDA { return maximum(a, b); });
}

#if defined(__AVX512F__)
// The nearest whole number, and p 2^n for a whole n.
TFORMER_INLINE Vec<float> round_whole(Vec<float> x) {
  return (Vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TFORMER_INLINE Vec<double> round_whole(Vec<double> x) {
  return (Vec<double>)_mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x without the whole number below it; 0 for an infinite x.
TFORMER_INLINE Vec<float> fraction(Vec<float> x) {
  return (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// n need not be whole here: it counts as the whole number below it.
TFORMER_INLINE Vec<float> times_power(Vec<float> p, Vec<float> n) {
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
}
TFORMER_INLINE Vec<double> times_power(Vec<double> p, Vec<double> n) {
  return (Vec<double>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
}
#endif

// ---- bf16 and f16 as the upper bits of, or a smaller exponent than, float -------------------------------------------

using F = Vec<float>;
using U32 = Vec<uint32_t>;
using I32 = Vec<int32_t>;
using HalfBits = VecN<uint16_t, kLanes<float>>;

// Compilers make several instructions of these where the CPU has one.
TFORMER_INLINE U32 widen_bits(HalfBits h) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, U32);
#endif
}
TFORMER_INLINE HalfBits narrow_bits(U32 u) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, HalfBits);
#endif
}

TFORMER_INLINE F widen_bf16(HalfBits h) { return (F)(widen_bits(h) << 16); }

// The bits of the nearest bf16, ties to even, NaN kept, in the low half of each lane.
TFORMER_INLINE U32 narrow_bf16(F x) {
  const U32 u = (U32)x;
  const U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (x == x) ? rounded : ((u >> 16) | 0x40);
}

TFORMER_INLINE F widen_f16(HalfBits h) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps((__m128i)h);
#elif defined(__ARM_NEON)
  return (F)vcvt_f32_f16((float16x4_t)h);
#else
  const U32 u = widen_bits(h);
  const U32 magnitude = (u & 0x7fff) << 13;
  const U32 exponent = magnitude & 0x0f800000;
  const F normal = (F)(magnitude + 0x38000000);                                // rebias 15 -> 127
  const F special = (F)(magnitude + 0x70000000);                               // inf and NaN
  const F subnormal = (F)(magnitude + 0x38800000) - (F)(U32{} + 0x38800000u);  // renormalised by the subtraction
  const F value = (exponent == 0x0f800000) ? special : ((exponent == 0) ? subnormal : normal);
  return (F)((U32)value | ((u & 0x8000) << 16));
#endif
}

// The bits of the nearest f16, ties to even, in the low half of each lane.
TFORMER_INLINE U32 narrow_f16(F x) {
#if defined(__AVX512F__)
  return widen_bits((HalfBits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return widen_bits((HalfBits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  return widen_bits((HalfBits)vcvt_f16_f32((float32x4_t)x));
#else
  const U32 u = (U32)x, sign = u & 0x80000000u, magnitude = u ^ sign;
  const U32 normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U32 subnormal = (U32)((F)magnitude + (F)(U32{} + 0x3f000000u)) - 0x3f000000u;  // the addition rounds
  U32 half = (magnitude < 0x38800000u) ? subnormal : normal;
  half = (magnitude >= 0x477ff000u) ? (U32{} + 0x7c00u) : half;  // rounds past the largest finite f16
  half = (magnitude > 0x7f800000u) ? (U32{} + 0x7e00u) : half;   // NaN
  return half | (sign >> 16);
#endif
}

// ---- one vector of the arithmetic type A (float or double) from and to memory of type T -----------------------------

template <class A, class T>
TFORMER_INLINE Vec<A> load_as(const T* p) {
  if constexpr (sizeof(A) == sizeof(T)) {
    return load(p);
  } else if constexpr (sizeof(A) == 4 && sizeof(T) == 8) {
    return __builtin_convertvector(load_bytes<VecN<double, kLanes<float>>>(p), F);
  } else if constexpr (sizeof(A) == 8) {
    double wide[kLanes<double>];
    for (int i = 0; i < kLanes<double>; ++i) {
      if constexpr (sizeof(T) == 4) wide[i] = p[i];
      if constexpr (sizeof(T) == 2) {
        T lanes[kLanes<float>] = {p[i]};
        wide[i] = load_as<float>(lanes)[0];
      }
    }
    return load(wide);
  } else if constexpr (__is_same(T, bf16)) {
    return widen_bf16(load_bytes<HalfBits>(p));
  } else {
    return widen_f16(load_bytes<HalfBits>(p));
  }
}

template <class A, class T>
TFORMER_INLINE void store_as(T* p, Vec<A> v) {
  if constexpr (sizeof(A) == sizeof(T)) {
    store(p, v);
  } else if constexpr (sizeof(A) == 4 && sizeof(T) == 8) {
    store(p, __builtin_convertvector(v, VecN<double, kLanes<float>>));
  } else if constexpr (sizeof(A) == 8) {
    for (int i = 0; i < kLanes<double>; ++i) {
      if constexpr (sizeof(T) == 4) p[i] = static_cast<float>(v[i]);
      if constexpr (sizeof(T) == 2) {
        T lanes[kLanes<float>];
        store_as<float>(lanes, splat(static_cast<float>(v[i])));
        p[i] = lanes[0];
      }
    }
  } else if constexpr (__is_same(T, bf16)) {
    store(p, narrow_bits(narrow_bf16(v)));
  } else {
    store(p, narrow_bits(narrow_f16(v)));
  }
}

#if TFORMER_HAS_BF16_PRODUCTS
// The CPU's own narrowing of two vectors to bf16, nearest even. AVX-512's takes and gives 0 for subnormal numbers.
TFORMER_INLINE VecN<uint16_t, 2 * kLanes<float>> narrow_two_bf16(F low, F high) {
  using Pair = VecN<uint16_t, 2 * kLanes<float>>;
#if defined(__ARM_NEON)
  return (Pair)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
#else
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_kortestz_mask16_u8(_mm512_fpclass_ps_mask((__m512)low, kSubnormal),
                                           _mm512_fpclass_ps_mask((__m512)high, kSubnormal)),
                       1)) {
    return (Pair)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
  HalfBits half[2] = {narrow_bits(narrow_bf16(low)), narrow_bits(narrow_bf16(high))};
  return load_bytes<Pair>(half);
#endif
}
#endif

// Two vectors, one behind the other: a whole cache line of a 16-bit type where the vectors are that wide.
template <class A, class T>
TFORMER_INLINE void store_two_as(T* p, Vec<A> first, Vec<A> second) {
#if TFORMER_HAS_BF16_PRODUCTS
  if constexpr (__is_same(T, bf16)) return store(p, narrow_two_bf16(first, second));
#endif
  store_as<A>(p, first);
  store_as<A>(p + kLanes<A>, second);
}

// A vector to memory around the caches; p is aligned to its size. Ordered only by stream_fence.
template <class V, class T>
TFORMER_INLINE void stream(T* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
  store(p, v);
}
TFORMER_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// store_two_as around the caches; p is aligned to what the two take together.
template <class A, class T>
TFORMER_INLINE void stream_two_as(T* p, Vec<A> first, Vec<A> second) {
  constexpr bool kWhole = TFORMER_HAS_BF16_PRODUCTS && __is_same(T, bf16);  // both leave in one store
  using Piece = VecN<uint8_t, (kWhole ? 2 : 1) * kLanes<A>* static_cast<int>(sizeof(T))>;
  Piece piece[kWhole ? 1 : 2];
  store_two_as<A>(reinterpret_cast<T*>(piece), first, second);
  for (int u = 0; u < (kWhole ? 1 : 2); ++u) stream(reinterpret_cast<char*>(p) + u * sizeof(piece[0]), piece[u]);
}

// The same for the first n < lanes elements: the rest reads as zero and is not written.
template <class A, class T>
TFORMER_INLINE Vec<A> load_as(const T* p, int64_t n) {
  T lanes[kLanes<A>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load_as<A>(lanes);
}
template <class A, class T>
TFORMER_INLINE void store_as(T* p, Vec<A> v, int64_t n) {
  T lanes[kLanes<A>];
  store_as<A>(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// f(d) for the vectors of a row of `width` elements, narrowed to memory of type T.
template <class A, class T, class F>
TFORMER_INLINE void store_row(T* to, int64_t width, F&& f) {
  constexpr int L = kLanes<A>;
  int64_t d = 0;
  for (; width - d >= 2 * L; d += 2 * L) store_two_as<A>(to + d, f(d), f(d + L));
  for (; width - d >= L; d += L) store_as<A>(to + d, f(d));
  if (d < width) store_as<A>(to + d, f(d), width - d);
}

// Each lane as memory of type T would give it back.
template <class T, class V>
TFORMER_INLINE V rounded(V v) {
  if constexpr (__is_same(T, bf16)) {
    return (V)(narrow_bf16(v) << 16);
  } else if constexpr (__is_same(T, f16)) {
    return widen_f16(narrow_bits(narrow_f16(v)));
  } else {
    return v;
  }
}

// Two vectors at once: where the CPU narrows to bf16 itself, it narrows two.
template <class T, class V>
TFORMER_INLINE void round_two(V& first, V& second) {
#if TFORMER_HAS_BF16_PRODUCTS
  if constexpr (__is_same(T, bf16) && __is_same(V, F)) {
    const auto pair = narrow_two_bf16(first, second);
    HalfBits half[2];
    std::memcpy(half, &pair, sizeof(pair));
    first = widen_bf16(half[0]), second = widen_bf16(half[1]);
    return;
  }
#endif
  first = rounded<T>(first), second = rounded<T>(second);
}

// ---- 32 x 32 -> 64 bit products of the even lanes --------------------------------------------------

using U64 = Vec<uint64_t>;

TFORMER_INLINE U64 multiply_even(U32 a, uint32_t b) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__ARM_NEON)
  return (U64)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
  return ((U64)a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}
// x where a lane is at least `least`, 0 elsewhere.
TFORMER_INLINE F where_at_least(U32 a, uint32_t least, float x) {
#if defined(__AVX512F__)
  const __mmask16 found = _mm512_cmpge_epu32_mask((__m512i)a, _mm512_set1_epi32(static_cast<int>(least)));
  return (F)_mm512_maskz_mov_ps(found, _mm512_set1_ps(x));
#else
  return (F)((U32)splat(x) & (U32)(a >= least));
#endif
}
// x * by likewise.
TFORMER_INLINE F multiply_where_at_least(U32 a, uint32_t least, F x, float by) {
#if defined(__AVX512F__)
  const __mmask16 found = _mm512_cmpge_epu32_mask((__m512i)a, _mm512_set1_epi32(static_cast<int>(least)));
  return (F)_mm512_maskz_mul_ps(found, (__m512)x, _mm512_set1_ps(by));
#else
  return (F)((U32)(x * by) & (U32)(a >= least));
#endif
}
// The even lanes of both: a0 b0 a2 b2 ...
TFORMER_INLINE U32 interleave_even(U32 a, U32 b) {
#if defined(__AVX512F__)
  return (U32)_mm512_mask_shuffle_epi32((__m512i)a, 0xaaaa, (__m512i)b, _MM_PERM_CCAA);
#else
  return (U32)(((U64)a & 0xffffffffu) | (U64)b << 32);
#endif
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
