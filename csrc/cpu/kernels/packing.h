// From rows in memory to the packed operands of product.h: widened (or paired), zero-padded, aligned.
#pragma once

#include "product.h"

namespace tformer::TFORMER_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Groups that `width` elements of a row take when the sum runs along the row: steps of the sum, and padded to whole
// vectors.
template <class P>
constexpr int64_t sum_groups(int64_t width) {
  return round_up(width, kUnit<P>) / P::kStep;
}
template <class P>
constexpr int64_t row_groups(int64_t width) {
  return round_up((width + P::kStep - 1) / P::kStep, kLanes<typename P::Real>);
}

// Whether `count` rows in memory are groups as they stand, so that a product can read them there as its A operand.
template <class P, class T>
bool in_place(int64_t width, int64_t stride, int64_t count) {
  return P::kSlices == 1 && sizeof(typename P::Group) == P::kStep * sizeof(T) && width % kUnit<P> == 0 &&
         stride % P::kStep == 0 && count % P::kRowUnit == 0;
}

// Groups from tile to tile along the sum.
template <class P>
constexpr int64_t kTileUnit = P::kSlices * kTileGroups;

// Where the first slice of a group lies in a packed operand: group k of row r of a first one, whose rows have `groups`;
// column n of step k, even if it is zipped, of a second one, which has `columns` columns (vectors) and `steps` steps
// (tiles).
template <class P>
TFORMER_INLINE int64_t place_along(int64_t r, int64_t k, int64_t groups) {
  if (!P::kTiles) return r * groups + k;
  return (r / kTileSide * (groups / kTileSide) + k / kTileSide) * kTileUnit<P> + r % kTileSide * kTileSide +
         k % kTileSide;
}
template <class P>
TFORMER_INLINE int64_t place_down(int64_t k, int64_t n, int64_t columns, int64_t steps) {
  if (!P::kTiles) return k * columns + (P::kZipped ? 2 * n : n);
  return (n / kTileSide * (steps / kTileSide) + k / kTileSide) * kTileUnit<P> + k % kTileSide * kTileSide +
         n % kTileSide;
}

// The product of operands packed like this, `count` steps of it.
template <class P>
ProductOperands<P> packed_product(const typename P::Group* a, int64_t groups, const typename P::Group* b,
                                  int64_t columns, int64_t steps, int64_t count) {
  if (!P::kTiles) return {a, groups, 1, b, columns, count};
  constexpr int64_t kUnit = kTileUnit<P>;
  return {a, kTileSide, 1, b, kTileSide, count, kUnit, groups / kTileSide * kUnit, kUnit, steps / kTileSide * kUnit};
}

// Rows read ahead of their use: a row is too short, and the next one too far away, for the CPU to see it coming.
constexpr int64_t kRowsAhead = 16;

// Whether all elements of the groups seen are finite: none has all bits of the exponent set.
template <class P>
class Finite {
 public:
  TFORMER_INLINE void operator()(Vec<typename P::Group> groups) {
    largest_ = maximum((Vec<Bits>)groups & kMagnitude, largest_);
  }
  bool holds() const { return max_lanes<Bits>(largest_) < kInfinityBits; }

 private:
  using Bits = std::conditional_t<P::kStep == 2, int16_t, Integer<typename P::Real>>;
  static constexpr Bits kMagnitude = static_cast<Bits>(~(uint64_t{1} << (8 * sizeof(Bits) - 1)));
  static constexpr Bits kInfinityBits =
      static_cast<Bits>(sizeof(Bits) == 8 ? 0x7ff0000000000000 : (sizeof(Bits) == 4 ? 0x7f800000 : 0x7f80));
  Vec<Bits> largest_ = {};
};

// In its place where nobody asks.
struct Unseen {
  template <class V>
  TFORMER_INLINE void operator()(V) const {}
  static constexpr bool holds() { return true; }
};

// Asked of all operands in slices, whose lower ones are 0 for inf and NaN.
template <class P>
using FiniteSlices = std::conditional_t<(P::kSlices > 1), Finite<P>, Unseen>;

// One vector of numbers from position d of a row of `width` elements; past the end it is zero.
template <class Real, class T>
TFORMER_INLINE Vec<Real> load_numbers(const T* row, int64_t d, int64_t width) {
  const int64_t left = width - d;
  if (left >= kLanes<Real>) return load_as<Real>(row + d);
  return left > 0 ? load_as<Real>(row + d, left) : Vec<Real>{};
}

// A vector of groups in all its slices; one from position d (in groups) of such a row.
template <class P>
struct Groups {
  Vec<typename P::Group> slice[P::kSlices];
};
template <class P, class T>
TFORMER_INLINE Groups<P> load_groups(const T* row, int64_t d, int64_t width) {
  using Real = typename P::Real;
  constexpr int L = kLanes<Real>;
  Groups<P> groups{};
  if constexpr (P::kStep == 1) {
    groups.slice[0] = load_numbers<Real>(row, d, width);
  } else if constexpr (P::kSlices > 1) {
    P::split_any_along(load_numbers<Real>(row, 2 * d, width), load_numbers<Real>(row, 2 * d + L, width), groups.slice);
  } else if (const int64_t left = width - d * P::kStep; left >= L * P::kStep) {
    groups.slice[0] = load_bytes<Vec<typename P::Group>>(row + d * P::kStep);
  } else if (left > 0) {
    std::memcpy(&groups.slice[0], row + d * P::kStep, static_cast<size_t>(left) * sizeof(T));
  }
  return groups;
}

// Rows as they are, of row_groups(width); rows in [count, padded) become zero. The A operand of q.k, do.v.
// see(groups) is called with the first slice of all that is read.
template <class P, class T, class See>
void pack_along_row(const T* rows, int64_t stride, int64_t count, int64_t padded, int64_t width, typename P::Group* out,
                    See&& see_all) {
  constexpr int L = kLanes<typename P::Real>;
  const int64_t groups = row_groups<P>(width), whole = width / (L * P::kStep) * L;
  auto see = see_all;  // in a register
  for (int64_t r = 0; r < count; ++r, rows += stride) {
    if (r % kTileSide == 0) keep_tiles_awake<P>();
    if (r + kRowsAhead < count) prefetch_row(rows + kRowsAhead * stride, width);
    const auto pack = [&](int64_t d, int64_t end) TFORMER_LAMBDA {
      const Groups<P> x = load_groups<P>(rows, d, end);
      see(x.slice[0]);
      auto* to = out + place_along<P>(r, d, groups);
      for (int n = 0; n < P::kSlices; ++n) store(to + n * kTileGroups, x.slice[n]);
    };
    for (int64_t d = 0; d < whole; d += L) pack(d, (d + L) * P::kStep);
    if (whole < groups) pack(whole, width);
  }
  for (int64_t r = count; r < padded; ++r) {
    for (int64_t d = 0; d < groups; d += L) {
      auto* to = out + place_along<P>(r, d, groups);
      for (int n = 0; n < P::kSlices; ++n) store(to + n * kTileGroups, Vec<typename P::Group>{});
    }
  }
  see_all = see;
}

// Shows the groups of rows that are read where they are; rows of whole vectors.
template <class P, class T, class See>
void see_rows(const T* rows, int64_t stride, int64_t count, int64_t width, See&& see_all) {
  using Real = typename P::Real;
  auto see = see_all;  // in a register
  for (int64_t r = 0; r < count; ++r, rows += stride) {
    if (r + kRowsAhead < count) prefetch_row(rows + kRowsAhead * stride, width);
    for (int64_t d = 0; d < width; d += kLanes<Real> * P::kStep) see(load_bytes<Vec<typename P::Group>>(rows + d));
  }
  see_all = see;
}

// Interleaves the halves of two vectors of n elements: (a0 b0 a1 b1 ...), kHigh ? upper halves : lower halves.
template <bool kHigh, class V, int... kIndex>
TFORMER_INLINE V zip(V a, V b, std::integer_sequence<int, kIndex...>) {
  constexpr int n = sizeof...(kIndex);
  return __builtin_shufflevector(a, b, (kIndex / 2 + (kHigh ? n / 2 : 0) + (kIndex % 2 ? n : 0))...);
}

// A vector of groups of a second operand to its place; zipped, with that of the next step.
template <class P>
TFORMER_INLINE void store_step(typename P::Group* to, Vec<typename P::Group> groups, Vec<typename P::Group> next) {
  if constexpr (P::kZipped) {
    constexpr int L = kLanes<typename P::Group>;
    using Indices = std::make_integer_sequence<int, L>;
    store(to, zip<false>(groups, next, Indices{})), store(to + L, zip<true>(groups, next, Indices{}));
  } else {
    store(to, groups);
  }
}

// Groups down the rows, of an operand of `steps` steps; the B operand of sums over rows (p.v, ds.k, pT.do, dsT.q).
template <class P, class T, class See>
void pack_down_rows(const T* rows, int64_t stride, int64_t count, int64_t padded, int64_t width, typename P::Group* out,
                    int64_t steps, See&& see_all) {
  if constexpr (P::kStep == 1) {
    pack_along_row<P>(rows, stride, count, padded, width, out, see_all);
  } else if constexpr (P::kSlices > 1) {
    constexpr int L = kLanes<float>;
    const int64_t columns = round_up(width, L);
    auto see = see_all;  // in a register
    for (int64_t r = 0; r < padded; r += 2, rows += 2 * stride) {
      if (r % kTileSide == 0) keep_tiles_awake<P>();
      for (int64_t i = kRowsAhead; i < kRowsAhead + 2; ++i) {
        if (r + i < count) prefetch_row(rows + i * stride, width);
      }
      for (int64_t d = 0; d < columns; d += L) {
        Groups<P> x;
        P::split_any_down(r < count ? load_numbers<float>(rows, d, width) : F{},
                          r + 1 < count ? load_numbers<float>(rows + stride, d, width) : F{}, x.slice);
        see(x.slice[0]);
        auto* to = out + place_down<P>(r / 2, d, columns, steps);
        for (int n = 0; n < P::kSlices; ++n) store(to + n * kTileGroups, x.slice[n]);
      }
    }
    see_all = see;
  } else {
    constexpr int L = kLanes<typename P::Real>;
    using Elements = Vec<int16_t>;
    using Indices = std::make_integer_sequence<int, 2 * L>;
    constexpr int kRows = P::kZipped ? 4 : 2;
    const int64_t columns = round_up(width, L);
    auto see = see_all;  // in a register
    for (int64_t r = 0; r < padded; r += kRows, rows += kRows * stride) {
      if (r % kTileSide == 0) keep_tiles_awake<P>();
      for (int64_t i = kRowsAhead; i < kRowsAhead + kRows; ++i) {
        if (r + i < count) prefetch_row(rows + i * stride, width);
      }
      for (int64_t d = 0; d < columns; d += 2 * L) {
        Elements row[kRows] = {};
        for (int64_t i = 0; i < kRows && r + i < count; ++i) {
          if (width - d >= 2 * L) {
            row[i] = load_bytes<Elements>(rows + i * stride + d);
          } else {
            std::memcpy(&row[i], rows + i * stride + d, static_cast<size_t>(width - d) * 2);
          }
        }
        for (int i = 0; i < kRows; ++i) see((Vec<typename P::Group>)row[i]);
        const auto store_half = [&](auto high, int64_t column) TFORMER_LAMBDA {
          store_step<P>(out + place_down<P>(r / 2, column, columns, steps),
                        (Vec<typename P::Group>)zip<high>(row[0], row[1], Indices{}),
                        (Vec<typename P::Group>)zip<high>(row[kRows - 2], row[kRows - 1], Indices{}));
        };
        store_half(std::false_type{}, d);
        if (d + L < columns) store_half(std::true_type{}, d + L);
      }
    }
    see_all = see;
  }
}

// The two kinds of shuffles that a transposition is made of; kLane counts the lanes.
template <class G, int... kLane>
struct Shuffles {
  static constexpr int L = kLanes<G>, kBlock = 16 / static_cast<int>(sizeof(G)), kBlocks = L / kBlock;
  // Within each 16 bytes: (a0 b0 a1 b1), or (a2 b2 a3 b3).
  template <bool kHigh>
  static TFORMER_INLINE Vec<G> zip_lanes(Vec<G> a, Vec<G> b) {
    return __builtin_shufflevector(
        a, b, (kLane / kBlock * kBlock + kLane % kBlock / 2 + (kHigh ? kBlock / 2 : 0) + (kLane % 2 ? L : 0))...);
  }
  // Of whole 16 bytes: (a0 a2 b0 b2), or (a1 a3 b1 b3).
  template <bool kOdd>
  static TFORMER_INLINE Vec<G> unzip_blocks(Vec<G> a, Vec<G> b) {
    return __builtin_shufflevector(
        a, b, (kLane * 2 / L * L + (kLane * 2 % L / (2 * kBlock) * 2 + kOdd) * kBlock + kLane % kBlock)...);
  }
};
template <class G, int... kLane>
Shuffles<G, kLane...> shuffles_of(std::integer_sequence<int, kLane...>);

// L x L transposition: within 16 bytes by perfect shuffles of the rows, then the 16 bytes as blocks.
template <class G>
TFORMER_INLINE void transpose(Vec<G> (&x)[kLanes<G>]) {
  using S = decltype(shuffles_of<G>(std::make_integer_sequence<int, kLanes<G>>{}));
  constexpr int L = S::L, kBlock = S::kBlock;
  Vec<G> y[L];
#pragma GCC unroll 2
  for (int stage = 1; stage < kBlock; stage *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2) {
      const int from = i / kBlock * kBlock + i % kBlock / 2;
      y[i] = S::template zip_lanes<false>(x[from], x[from + kBlock / 2]);
      y[i + 1] = S::template zip_lanes<true>(x[from], x[from + kBlock / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) x[i] = y[i];
  }
  if constexpr (S::kBlocks > 1) {
#pragma GCC unroll 2
    for (int stage = 1; stage < S::kBlocks; stage *= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < L / 2; ++i) {
        const int from = i / kBlock * 2 * kBlock + i % kBlock;
        y[i] = S::template unzip_blocks<false>(x[from], x[from + kBlock]);
        y[i + L / 2] = S::template unzip_blocks<true>(x[from], x[from + kBlock]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) x[i] = y[i];
    }
  }
}

// L rows of L groups as columns: to[n][m] = from[m][n].
template <class G>
void transpose_to(const G* from, int64_t from_row, G* to, int64_t to_row) {
  constexpr int L = kLanes<G>;
  Vec<G> x[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) x[i] = load(from + i * from_row);
  transpose<G>(x);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(to + i * to_row, x[i]);
}

// The tiles of an operand in place: columns of steps become rows, of as many groups. The A operand of doT.p, qT.ds.
template <class P>
void transpose_tiles(typename P::Group* operand, int64_t columns, int64_t steps) {
  const int64_t tiles = columns / kTileSide * (steps / kTileSide) * P::kSlices;
  for (int64_t n = 0; n < tiles; ++n, operand += kTileGroups) {
    transpose_to<typename P::Group>(operand, kTileSide, operand, kTileSide);
  }
}

// Columns of products with keys: whole register tiles, so that one panel is one tile wide.
template <class P>
constexpr int64_t kPanel = P::kTileColumns * kLanes<typename P::Real>;

// Where the panel with a key begins; in tiles, the tile.
template <class P>
TFORMER_INLINE int64_t panel_place(int64_t key, int64_t groups) {
  if (P::kTiles) return place_down<P>(0, key, 0, groups);
  return key / kPanel<P> * (groups * kPanel<P>);
}

// Transposed panels: [panel][group of width][key in panel]; keys in [count, padded) become zero, padded is a whole
// number of panels. The B operand of sums along the row (q.kT, do.vT). see: as above.
template <class P, class T, class See>
void pack_transposed(const T* rows, int64_t stride, int64_t count, int64_t padded, int64_t width,
                     typename P::Group* out, See&& see_all) {
  using Group = typename P::Group;
  constexpr int L = kLanes<Group>;
  const int64_t groups = sum_groups<P>(width), row = P::kTiles ? kTileSide : kPanel<P>;
  auto see = see_all;  // in a register
  for (int64_t key = 0; key < padded; key += L, rows += L * stride) {
    keep_tiles_awake<P>();
    Group* panel = out + panel_place<P>(key, groups) + key % kPanel<P> * (P::kTiles ? 0 : (P::kZipped ? 2 : 1));
    for (int64_t next = L; next < 2 * L && key + next < count; ++next) prefetch_row(rows + next * stride, width);
    for (int64_t d = 0; d < groups; d += L) {
      Group* to = panel + (P::kTiles ? d / kTileSide * kTileUnit<P> : d * kPanel<P>);
      if constexpr (P::kSlices > 1) {  // transposed as numbers, of which two rows make a row of pairs
#pragma GCC unroll 2
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t column = 2 * d + half * L;
          F x[L];
          if (count - key >= L && width >= column + L) {
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) x[i] = load_as<float>(rows + i * stride + column);
          } else {
            for (int i = 0; i < L; ++i)
              x[i] = key + i < count ? load_numbers<float>(rows + i * stride, column, width) : F{};
          }
          transpose<float>(x);
#pragma GCC unroll 8
          for (int i = 0; i < L / 2; ++i, to += kTileSide) {
            Groups<P> pairs;
            P::split_any_down(x[2 * i], x[2 * i + 1], pairs.slice);
            see(pairs.slice[0]);
#pragma GCC unroll 3
            for (int n = 0; n < P::kSlices; ++n) store(to + n * kTileGroups, pairs.slice[n]);
          }
        }
        continue;
      }
      Vec<Group> x[L];
      if (count - key >= L && width >= (d + L) * P::kStep) {  // nothing to pad: no branch between the loads
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) x[i] = load_groups<P>(rows + i * stride, d, (d + L) * P::kStep).slice[0];
      } else {
        for (int i = 0; i < L; ++i) {
          x[i] = key + i < count ? load_groups<P>(rows + i * stride, d, width).slice[0] : Vec<Group>{};
        }
      }
      transpose<Group>(x);
      constexpr int kSteps = P::kZipped ? 2 : 1;
      if (groups - d >= L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i += kSteps) store_step<P>(to + i * row, x[i], x[i + kSteps - 1]);
      } else {
        for (int i = 0; i < L && d + i < groups; i += kSteps) store_step<P>(to + i * row, x[i], x[i + kSteps - 1]);
      }
    }
  }
  see_all = see;
}

// The same numbers, every NaN as what can be split into slices.
template <class P>
TFORMER_INLINE F separable(F x) {
  if constexpr (P::kSlices > 1) return (x == x) ? x : splat(__builtin_nanf(""));
  return x;
}

// What products write is in Real; as an operand of the next product it may have to be narrowed and paired.
// Along the row.
template <class P>
TFORMER_INLINE void narrow_along_row(const typename P::Real* row, int64_t columns, typename P::Group* out) {
  constexpr int L = kLanes<typename P::Real>;
  if constexpr (P::kTiles) {
    for (int64_t j = 0; j < columns; j += 2 * L) {
      P::store_two_along(out + j / (2 * L) * kTileUnit<P>, separable<P>(load(row + j)),
                         separable<P>(load(row + j + L)));
    }
  } else if constexpr (P::kStep == 2) {
    for (int64_t j = 0; j < columns; j += L) P::store_along(out + j / 2, load(row + j));
  }
}
// Down the rows: two rows become one row of pairs, whose vectors are `side` groups apart.
template <class P>
TFORMER_INLINE void narrow_down_rows(const typename P::Real* row0, const typename P::Real* row1, int64_t columns,
                                     typename P::Group* out, int64_t side) {
  if constexpr (P::kStep == 2) {
    for (int64_t j = 0; j < columns; j += kLanes<float>, out += side) {
      P::store_pairs(out, separable<P>(load(row0 + j)), separable<P>(load(row1 + j)));
    }
  }
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
