// How the elements of a product's operands are held: one by one, in pairs, in slices.
#pragma once

#include "tiles.h"
#include "vec_bf16_products.h"

namespace tformer::TFORMER_ISA {
namespace {

// How elements of type T are held in products: Real is the arithmetic type, Group what one multiply-add consumes. Sums
// have whole units of kSumUnit steps, and a first operand whole units of kRowUnit rows, of which the last ones are
// ignored; kZipped: two steps of a second operand are one row of it, column by column. Setup must live while products
// are made.
struct NoSetup {
  NoSetup() {}
};
template <class T>
struct Wide {  // one element a group
  using Real = T;
  using Group = T;
  using Setup = NoSetup;
  static constexpr int kStep = 1, kSlices = 1, kSumUnit = 1, kRowUnit = 1;
  static constexpr int kTileRows = kVectorTileRows, kTileColumns = kVectorTileColumns;
  static constexpr bool kTiles = false, kZipped = false;
  template <class A>  // a group, or a vector of them
  static TFORMER_INLINE Vec<Real> multiply_add(A a, Vec<Group> b, Vec<Real> c) {
    return a * b + c;
  }
  static TFORMER_INLINE Real element(Group g, int) { return g; }
  static TFORMER_INLINE Vec<Real> elements(Vec<Group> g, int) { return g; }
  static TFORMER_INLINE void store_along(Group* to, Vec<Real> x) { store(to, x); }
  static TFORMER_INLINE void scale(Group* groups, Real by) { store(groups, load(groups) * by); }
};

#if TFORMER_HAS_BF16_PRODUCTS
struct PairBf16 {
  using Real = float;
  using Group = uint32_t;
  using Setup = NoSetup;
  static constexpr bool kTiles = false, kZipped = TFORMER_HAS_BF16_BLOCKS;
  static constexpr int kStep = 2, kSlices = 1, kSumUnit = kZipped ? 2 : 1, kRowUnit = 1;
  static constexpr int kTileRows = kVectorTileRows, kTileColumns = kVectorTileColumns;
  static TFORMER_INLINE F multiply_add(Group a, U32 b, F c) { return multiply_add(U32{} + a, b, c); }
  static TFORMER_INLINE F multiply_add(U32 a, U32 b, F c) { return multiply_add_pairs(a, b, c); }
  static TFORMER_INLINE float element(Group g, int i) {
    const uint32_t bits = i == 0 ? g << 16 : g & 0xffff0000u;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static TFORMER_INLINE F elements(U32 g, int i) { return (F)(i == 0 ? g << 16 : g & 0xffff0000u); }
  static TFORMER_INLINE void scale(Group* groups, float by) {
    const U32 g = load(groups);
    store(groups, narrow_bf16(elements(g, 0) * by) | narrow_bf16(elements(g, 1) * by) << 16);
  }
  static TFORMER_INLINE void store_along(Group* to, F x) { store(to, narrow_weights(x)); }
  // Two vectors of a row, one behind the other; a vector of each of two rows.
  static TFORMER_INLINE void store_two_along(Group* to, F first, F second) {
    store(to, narrow_two_weights(first, second));
  }
  static TFORMER_INLINE void store_pairs(Group* to, F low, F high) { store(to, pair_weights(low, high)); }
  // Both: x[row][vector] along each row, and down both for each vector.
  static TFORMER_INLINE void store_both(Group* const (&along)[2], Group* const (&down)[2], const F (&x)[2][2]) {
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) store_two_along(along[n], x[n][0], x[n][1]), store_pairs(down[n], x[0][n], x[1][n]);
  }
};
#endif

#if TFORMER_HAS_TILES
// The same pairs, multiplied in tile registers. The steps of a first operand must lie one behind the other.
struct TileBf16 : PairBf16 {
  using Setup = TilesInForce;
  static constexpr int kSumUnit = kTileSide, kRowUnit = kTileSide;
  static constexpr int kTileRows = 2 * kTileSide, kTileColumns = 2;
  static constexpr bool kTiles = true;
};

// Numbers as sums of kCount bf16, of which each has the upper bits of what those before it leave: three hold a float32,
// two a float16, exactly (Henry, Heinecke & Tang 2019). Of a product's terms those are left out that are smaller than
// its rounding.
template <int kCount>
struct TileSlices : TileBf16 {
  static constexpr int kSlices = kCount;
  using Slices = U32[kCount];

  // Of numbers of which no NaN has all bits of its fraction set, and none is infinite. 32 numbers of a row; 16 of each
  // of two rows.
  static TFORMER_INLINE void split_along(F first, F second, Slices& slices) {
#pragma GCC unroll 3
    for (int n = 0; n < kCount; ++n) slices[n] = upper_halves(take_slice(first, n), take_slice(second, n));
  }
  static TFORMER_INLINE void split_down(F low, F high, Slices& slices) {
#pragma GCC unroll 3
    for (int n = 0; n < kCount; ++n) slices[n] = pair_halves(take_slice(low, n), take_slice(high, n));
  }
  // Any numbers, as operands: inf and NaN have no slices but the first.
  static TFORMER_INLINE void split_any_along(F first, F second, Slices& slices) {
    if (__builtin_expect(!any_lane(is_large(first) | is_large(second)), 1)) return split_along(first, second, slices);
    for (int n = 0; n < kCount; ++n) slices[n] = upper_halves(take_any_slice(first), take_any_slice(second));
  }
  static TFORMER_INLINE void split_any_down(F low, F high, Slices& slices) {
    if (__builtin_expect(!any_lane(is_large(low) | is_large(high)), 1)) return split_down(low, high, slices);
    for (int n = 0; n < kCount; ++n) slices[n] = pair_halves(take_any_slice(low), take_any_slice(high));
  }

  static TFORMER_INLINE void scale(Group* groups, float by) {
    F low{}, high{};
    for (int n = kCount - 1; n >= 0; --n) {
      const U32 slice = load(groups + n * kTileGroups);
      low += elements(slice, 0), high += elements(slice, 1);
    }
    store_pairs(groups, low * by, high * by);
  }
  static TFORMER_INLINE void store_two_along(Group* to, F first, F second) {
    Slices slices;
    split_along(first, second, slices);
    store_slices(to, slices);
  }
  static TFORMER_INLINE void store_pairs(Group* to, F low, F high) {
    Slices slices;
    split_down(low, high, slices);
    store_slices(to, slices);
  }
  static TFORMER_INLINE void store_both(Group* const (&along)[2], Group* const (&down)[2], F (&x)[2][2]) {
#pragma GCC unroll 3
    for (int n = 0; n < kCount; ++n) {
      U32 slice[2][2];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) slice[i / 2][i % 2] = take_slice(x[i / 2][i % 2], n);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        store(along[i] + n * kTileGroups, upper_halves(slice[i][0], slice[i][1]));
        store(down[i] + n * kTileGroups, pair_halves(slice[0][i], slice[1][i]));
      }
    }
  }

 private:
  static TFORMER_INLINE void store_slices(Group* to, const Slices& slices) {
#pragma GCC unroll 3
    for (int n = 0; n < kCount; ++n) store(to + n * kTileGroups, slices[n]);
  }
  static constexpr uint32_t kUpper = 0xffff0000u;
  // Slice n of x, in the upper halves of lanes; x keeps the rest. The first is the nearest bf16 (of two, the larger),
  // so that what is left out of a product has no sign of its own; the second of three need not be; the third is exact.
  static TFORMER_INLINE U32 take_slice(F& x, int n) {
    const U32 lead = n == 0 || kCount == 2 ? (U32)x + 0x8000u : (U32)x;
    if (n < kCount - 1) x -= (F)(lead & kUpper);
    return lead;
  }
  // What rounding would carry to infinity is cut off instead.
  static TFORMER_INLINE Vec<int32_t> is_large(F x) { return ((Vec<int32_t>)x & 0x7fffffff) >= 0x7f7f8000; }
  static TFORMER_INLINE U32 take_any_slice(F& x) {
    const U32 whole = (U32)x, quiet = (x == x) ? U32{} : U32{} + 0x400000u;
    const U32 lead = (whole + (is_large(x) ? U32{} : U32{} + 0x8000u)) | quiet;
    const F rest = x - (F)(lead & kUpper);
    x = (rest == rest) ? rest : F{};
    return lead;
  }
  static TFORMER_INLINE U32 pair_halves(U32 low, U32 high) {
    constexpr int kFirstOrBoth = 0xf8;  // a | (b & c)
    return (U32)_mm512_ternarylogic_epi32((__m512i)(low >> 16), (__m512i)high, _mm512_set1_epi32(int(kUpper)),
                                          kFirstOrBoth);
  }
  static TFORMER_INLINE U32 upper_halves(U32 a, U32 b) {
    alignas(64) static constexpr uint16_t kOdd[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (U32)_mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(kOdd), (__m512i)b);
  }
};
#endif

// The terms of a product of sums of slices, so that each shares an operand with the next one.
template <int kSlices>
struct Terms {
  static constexpr int kCount = 1, kA[] = {0}, kB[] = {0};
};
template <>
struct Terms<2> {  // left out: 2^-18 of it
  static constexpr int kCount = 3, kA[] = {1, 0, 0}, kB[] = {0, 0, 1};
};
template <>
struct Terms<3> {  // at most 2^-24, as a rule 2^-28
  static constexpr int kCount = 6, kA[] = {2, 1, 1, 0, 0, 0}, kB[] = {0, 0, 1, 1, 2, 0};
};

template <class T>
struct PackOf {
  using type = Wide<float>;
};
template <>
struct PackOf<double> {
  using type = Wide<double>;
};
#if TFORMER_HAS_TILES
template <>
struct PackOf<bf16> {
  using type = TileBf16;
};
#elif TFORMER_HAS_BF16_PRODUCTS
template <>
struct PackOf<bf16> {
  using type = PairBf16;
};
#endif
template <class T>
using Pack = typename PackOf<T>::type;

// Likewise where numbers are split into slices for tile registers.
template <class T>
struct SplitPackOf : PackOf<T> {};
#if TFORMER_HAS_TILES
template <>
struct SplitPackOf<f16> {
  using type = TileSlices<2>;
};
template <>
struct SplitPackOf<float> {
  using type = TileSlices<3>;
};
#endif
template <class T>
using SplitPack = typename SplitPackOf<T>::type;

// Elements along the sum that the padding of operands makes whole.
template <class P>
constexpr int64_t kUnit = P::kSumUnit * P::kStep;
// Likewise of columns that a later product sums over.
template <class P>
constexpr int64_t kColumnUnit = kUnit<P> > kLanes<typename P::Real> ? kUnit<P> : kLanes<typename P::Real>;

}  // namespace
}  // namespace tformer::TFORMER_ISA
