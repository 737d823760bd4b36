// Small matrix products C (+)= A B out of cache, as register tiles of kTileRows x kTileColumns vectors.
//
// Operands are made of groups: the elements along the summed dimension that one instruction consumes. A group is one
// float (or double), or a pair of bf16 in 32 bits where the CPU multiplies those (vdpbf16ps).
//   A: group (row r, step k) at a[r * a_row + k * a_step]; broadcast, so any strides serve, transposed ones too
//   B: group (step k, column n) at b[k * b_step + n], columns padded to whole vectors
//   C: arithmetic type, element (r, n) at c[r * c_row + n]; accumulate adds the product to it, as one rounded sum, so
//      that a long sum made of several products loses less than one running total would
#pragma once

#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

// How elements of type T are held in products: Real is the arithmetic type, Group what one multiply-add consumes.
template <class T>
struct Wide {  // one element a group
  using Real = T;
  using Group = T;
  static constexpr int kStep = 1;
  static TFORMER_INLINE Vec<Real> multiply_add(Group a, Vec<Group> b, Vec<Real> c) { return a * b + c; }
  static TFORMER_INLINE Real element(Group g, int) { return g; }
  static TFORMER_INLINE Vec<Real> elements(Vec<Group> g, int) { return g; }
  static TFORMER_INLINE void store_along(Group* to, Vec<Real> x) { store(to, x); }
  static TFORMER_INLINE Vec<Group> scaled(Vec<Group> g, Real by) { return g * by; }
};

#if TFORMER_HAS_BF16_PRODUCTS
struct PairBf16 {
  using Real = float;
  using Group = uint32_t;
  static constexpr int kStep = 2;
  static TFORMER_INLINE F multiply_add(Group a, U32 b, F c) {
    return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)(U32{} + a), (__m512bh)b);
  }
  static TFORMER_INLINE float element(Group g, int i) {
    const uint32_t bits = i == 0 ? g << 16 : g & 0xffff0000u;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static TFORMER_INLINE F elements(U32 g, int i) { return (F)(i == 0 ? g << 16 : g & 0xffff0000u); }
  static TFORMER_INLINE U32 scaled(U32 g, float by) {
    return narrow_bf16(elements(g, 0) * by) | narrow_bf16(elements(g, 1) * by) << 16;
  }
  // The CPU's own narrowing takes and gives 0 for subnormal numbers: good for weights, not for results.
  static TFORMER_INLINE void store_along(Group* to, F x) { store(to, _mm512_cvtneps_pbh((__m512)x)); }
  static TFORMER_INLINE U32 pair(F low, F high) {
    alignas(64) static constexpr uint16_t kInterleave[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (U32)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave),
                                         (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
};
#endif

template <class T>
struct PackOf {
  using type = Wide<float>;
};
template <>
struct PackOf<double> {
  using type = Wide<double>;
};
#if TFORMER_HAS_BF16_PRODUCTS
template <>
struct PackOf<bf16> {
  using type = PairBf16;
};
#endif
template <class T>
using Pack = typename PackOf<T>::type;

template <class P>
struct ProductOperands {
  const typename P::Group* a;
  int64_t a_row, a_step;
  const typename P::Group* b;
  int64_t b_step;
  typename P::Real* c;
  int64_t c_row;
  int64_t steps;
  bool accumulate;
};

// The sums of one register tile.
template <class P, int kRows, int kColumns>
TFORMER_INLINE void multiply_tile(const ProductOperands<P>& m, Vec<typename P::Real> (&acc)[kRows][kColumns]) {
  using Real = typename P::Real;
  using Group = typename P::Group;
  constexpr int L = kLanes<Real>;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) acc[r][n] = Vec<Real>{};
  }
  const Group* a = m.a;
  const Group* b = m.b;
  const int64_t a_row = m.a_row, a_step = m.a_step, b_step = m.b_step;
#pragma GCC unroll 2
  for (int64_t k = 0; k < m.steps; ++k, a += a_step, b += b_step) {
    Vec<Group> row[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) row[n] = load(b + n * L);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Group x;  // of any alignment: it may lie in the caller's tensor
      std::memcpy(&x, a + r * a_row, sizeof(x));
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) acc[r][n] = P::multiply_add(x, row[n], acc[r][n]);
    }
  }
}

template <class P, int kRows, int kColumns>
__attribute__((noinline)) void register_tile(const ProductOperands<P>& m) {
  using Real = typename P::Real;
  constexpr int L = kLanes<Real>;
  // The second operand streams through the first-level cache and pushes out what c points to.
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) __builtin_prefetch(m.c + r * m.c_row + n * L, 1);
  }
  Vec<Real> acc[kRows][kColumns];
  multiply_tile<P>(m, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      Real* c = m.c + r * m.c_row + n * L;
      store(c, m.accumulate ? load(c) + acc[r][n] : acc[r][n]);
    }
  }
}

template <class P, int kRows>
TFORMER_INLINE void register_tile_columns(const ProductOperands<P>& m, int columns) {
  if (columns == 1) return register_tile<P, kRows, 1>(m);
  if (columns == 2) return register_tile<P, kRows, 2>(m);
  if constexpr (kTileColumns > 2) {
    if (columns == 3) return register_tile<P, kRows, 3>(m);
    if (columns == 4) return register_tile<P, kRows, 4>(m);
  }
}

template <class P>
TFORMER_INLINE void register_tile_rows(const ProductOperands<P>& m, int64_t rows, int columns) {
  switch (rows) {
    case 1:
      return register_tile_columns<P, 1>(m, columns);
    case 2:
      return register_tile_columns<P, 2>(m, columns);
    case 3:
      return register_tile_columns<P, 3>(m, columns);
    case 4:
      return register_tile_columns<P, 4>(m, columns);
    case 5:
      return register_tile_columns<P, 5>(m, columns);
    default:
      return register_tile_columns<P, kTileRows>(m, columns);
  }
}

// Steps [begin, end) of a sum.
struct Steps {
  int64_t begin, end;
};

// C (rows x columns) (+)= A B; columns is a whole number of vectors. steps_of(r): those of the sums of the row tile
// from r, where the others are known to be 0; there have to be some unless the product is added to C.
template <class P, class StepsOf>
void product(ProductOperands<P> m, int64_t rows, int64_t columns, StepsOf&& steps_of) {
  constexpr int L = kLanes<typename P::Real>;
  const int64_t vectors = columns / L;
  const int64_t strips = (vectors + kTileColumns - 1) / kTileColumns;
  const ProductOperands<P> all = m;
  for (int64_t strip = 0; strip < strips; ++strip) {  // near-equal strips: 5 vectors are 3 + 2, not 4 + 1
    const int64_t first = vectors * strip / strips, last = vectors * (strip + 1) / strips;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Steps sum = steps_of(r);
      if (sum.begin >= sum.end) continue;
      m.a = all.a + r * all.a_row + sum.begin * all.a_step;
      m.b = all.b + first * L + sum.begin * all.b_step;
      m.c = all.c + r * all.c_row + first * L;
      m.steps = sum.end - sum.begin;
      register_tile_rows<P>(m, rows - r < kTileRows ? rows - r : kTileRows, static_cast<int>(last - first));
    }
  }
}

template <class P>
void product(const ProductOperands<P>& m, int64_t rows, int64_t columns) {
  product<P>(m, rows, columns, [&](int64_t) TFORMER_LAMBDA { return Steps{0, m.steps}; });
}

// The same product with the terms left out that `hidden` marks: hidden[r * hidden_row + k * hidden_step], k counting
// elements. Taken only where B holds inf or NaN, which a weight of zero would turn into NaN. Same order of sums.
template <class P>
void product_without_hidden(const ProductOperands<P>& m, int64_t rows, int64_t columns, const uint8_t* hidden,
                            int64_t hidden_row, int64_t hidden_step) {
  using Real = typename P::Real;
  using Group = typename P::Group;
  constexpr int L = kLanes<Real>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < columns; n += L) {
      Real* c = m.c + r * m.c_row + n;
      Vec<Real> acc{};
      for (int64_t k = 0; k < m.steps; ++k) {
        Group a;
        std::memcpy(&a, m.a + r * m.a_row + k * m.a_step, sizeof(a));
        const auto b = load(m.b + k * m.b_step + n);
        for (int i = 0; i < P::kStep; ++i) {
          if (!hidden[r * hidden_row + (k * P::kStep + i) * hidden_step]) {
            acc = P::element(a, i) * P::elements(b, i) + acc;
          }
        }
      }
      store(c, m.accumulate ? load(c) + acc : acc);
    }
  }
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
