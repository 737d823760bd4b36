// From rows in memory to the packed operands of product.h: widened (or paired), zero-padded, aligned.
#pragma once

#include "product.h"

namespace tformer::TFORMER_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Groups that `width` elements of a row take when the sum runs along the row, padded to whole vectors.
template <class P>
constexpr int64_t row_groups(int64_t width) {
  return round_up((width + P::kStep - 1) / P::kStep, kLanes<typename P::Real>);
}

// Rows read ahead of their use: a row is too short, and the next one too far away, for the CPU to see it coming.
constexpr int64_t kRowsAhead = 16;

template <class T>
TFORMER_INLINE void prefetch_row(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d);
}

// Whether a row holds only finite numbers (all bits of the exponent set: inf or NaN).
template <class T>
bool row_is_finite(const T* row, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  constexpr Bits exponent = sizeof(T) == 8       ? static_cast<Bits>(0x7ff0000000000000)
                            : sizeof(T) == 4     ? static_cast<Bits>(0x7f800000)
                            : __is_same(T, bf16) ? static_cast<Bits>(0x7f80)
                                                 : static_cast<Bits>(0x7c00);
  unsigned found = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, row + i, sizeof(T));
    found |= (bits & exponent) == exponent;
  }
  return found == 0;
}

// One vector of groups from position d (in groups) of a row of `width` elements; past the end it is zero.
template <class P, class T>
TFORMER_INLINE Vec<typename P::Group> load_groups(const T* row, int64_t d, int64_t width) {
  using Real = typename P::Real;
  constexpr int L = kLanes<Real>;
  const int64_t left = width - d * P::kStep;
  if constexpr (P::kStep == 1) {
    if (left >= L) return load_as<Real>(row + d);
    return left > 0 ? load_as<Real>(row + d, left) : Vec<Real>{};
  } else {
    const T* pairs = row + d * P::kStep;
    if (left >= L * P::kStep) return load_bytes<Vec<typename P::Group>>(pairs);
    Vec<typename P::Group> v{};
    if (left > 0) std::memcpy(&v, pairs, static_cast<size_t>(left) * sizeof(T));
    return v;
  }
}

// Rows as they are: out[row][row_groups(width)]; rows in [count, padded) become zero. The A operand of q.k, do.v.
template <class P, class T>
void pack_along_row(const T* rows, int64_t stride, int64_t count, int64_t padded, int64_t width,
                    typename P::Group* out) {
  constexpr int L = kLanes<typename P::Real>;
  const int64_t groups = row_groups<P>(width);
  for (int64_t r = 0; r < padded; ++r) {
    if (r + kRowsAhead < count) prefetch_row(rows + (r + kRowsAhead) * stride, width);
    for (int64_t d = 0; d < groups; d += L) {
      store(out + r * groups + d, r < count ? load_groups<P>(rows + r * stride, d, width) : Vec<typename P::Group>{});
    }
  }
}

// Groups down the rows: out[row / kStep][padded width]; the B operand of sums over rows (p.v, ds.k, pT.do, dsT.q).
template <class P, class T>
void pack_down_rows(const T* rows, int64_t stride, int64_t count, int64_t padded, int64_t width,
                    typename P::Group* out) {
  constexpr int L = kLanes<typename P::Real>;
  const int64_t columns = round_up(width, L);
  if constexpr (P::kStep == 1) {
    pack_along_row<P>(rows, stride, count, padded, width, out);
  } else {
    for (int64_t r = 0; r < padded; r += 2) {
      for (int i = 0; i < 2; ++i) {
        if (r + i + kRowsAhead < count) prefetch_row(rows + (r + i + kRowsAhead) * stride, width);
      }
      for (int64_t d = 0; d < columns; d += L) {
        HalfBits half[2] = {};
        for (int i = 0; i < 2; ++i) {
          const int64_t n = r + i < count ? width - d : 0;
          std::memcpy(&half[i], rows + (r + i) * stride + d, static_cast<size_t>(n > L ? L : (n > 0 ? n : 0)) * 2);
        }
        store(out + (r / 2) * columns + d,
              __builtin_convertvector(half[0], U32) | (__builtin_convertvector(half[1], U32) << 16));
      }
    }
  }
}

// Interleaves the halves of two vectors: (a0 b0 a1 b1 ...), kHigh ? upper halves : lower halves.
template <bool kHigh, class G, int... kIndex>
TFORMER_INLINE Vec<G> zip(Vec<G> a, Vec<G> b, std::integer_sequence<int, kIndex...>) {
  constexpr int L = kLanes<G>;
  return __builtin_shufflevector(a, b, (kIndex / 2 + (kHigh ? L / 2 : 0) + (kIndex % 2 ? L : 0))...);
}

// L x L transposition: log2 L perfect shuffles of the rows.
template <class G>
TFORMER_INLINE void transpose(Vec<G> (&x)[kLanes<G>]) {
  constexpr int L = kLanes<G>;
  using Indices = std::make_integer_sequence<int, L>;
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    Vec<G> y[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      y[2 * i] = zip<false, G>(x[i], x[i + L / 2], Indices{});
      y[2 * i + 1] = zip<true, G>(x[i], x[i + L / 2], Indices{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) x[i] = y[i];
  }
}

// Columns of products with keys: whole register tiles, so that one panel is one tile wide.
template <class P>
constexpr int64_t kPanel = kTileColumns * kLanes<typename P::Real>;

// Transposed panels: out[panel][group of width][key in panel]; keys in [count, padded) become zero, padded is a whole
// number of panels. The B operand of sums along the row (q.kT, do.vT).
template <class P, class T>
void pack_transposed(const T* rows, int64_t stride, int64_t count, int64_t padded, int64_t width,
                     typename P::Group* out) {
  using Group = typename P::Group;
  constexpr int L = kLanes<Group>;
  const int64_t groups = (width + P::kStep - 1) / P::kStep;
  for (int64_t key = 0; key < padded; key += L) {
    Group* panel = out + key / kPanel<P> * (groups * kPanel<P>)+key % kPanel<P>;
    for (int64_t next = key + L; next < key + 2 * L && next < count; ++next) prefetch_row(rows + next * stride, width);
    for (int64_t d = 0; d < groups; d += L) {
      Vec<Group> x[L];
      for (int i = 0; i < L; ++i) {
        x[i] = key + i < count ? load_groups<P>(rows + (key + i) * stride, d, width) : Vec<Group>{};
      }
      transpose<Group>(x);
      for (int i = 0; i < L && d + i < groups; ++i) store(panel + (d + i) * kPanel<P>, x[i]);
    }
  }
}

// What products write is in Real; as an operand of the next product it may have to be narrowed and paired.
// Along the row: out[row][columns / kStep].
template <class P>
TFORMER_INLINE void narrow_along_row(const typename P::Real* row, int64_t columns, typename P::Group* out) {
  if constexpr (P::kStep == 2) {
    for (int64_t j = 0; j < columns; j += kLanes<float>) P::store_along(out + j / 2, load(row + j));
  }
}
// Down the rows: two rows become one row of pairs.
template <class P>
TFORMER_INLINE void narrow_down_rows(const typename P::Real* row0, const typename P::Real* row1, int64_t columns,
                                     typename P::Group* out) {
  if constexpr (P::kStep == 2) {
    for (int64_t j = 0; j < columns; j += kLanes<float>) store(out + j, P::pair(load(row0 + j), load(row1 + j)));
  }
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
