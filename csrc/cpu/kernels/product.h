// Small matrix products A B out of cache, as register tiles of kTileRows x kTileColumns vectors.
//
// Operands are made of groups: the elements along the summed dimension that one instruction consumes. A group is one
// float (or double), or a pair of bf16 in 32 bits where the CPU multiplies those (vdpbf16ps).
//   A: group (row r, step k) at a[r * a_row + k * a_step]; broadcast, so any strides serve, transposed ones too
//   B: group (step k, column n) at b[k * b_step + n], columns padded to whole vectors; or zipped, the groups of steps k
//      and k + 1 at b[k * b_step + 2 * n], where an instruction takes both (BFMMLA)
// Operands of tile registers are made of tiles: 16 rows or steps of 16 groups, 1 KB one behind the other. Elements may
// be sums of several bf16 (kSlices), whose tiles follow each other.
//   C: arithmetic type, element (r, n) at c[r * c_row + n]. IntoSums stores the product there or adds it, as one
//      rounded sum, so that a long sum made of several products loses less than one running total would. IntoRows
//      takes the last product of such a sum, which then leaves for its place in memory without coming by C
#pragma once

#include "operands.h"
#include "upcoming.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class P>
struct ProductOperands {
  const typename P::Group* a;
  int64_t a_row, a_step;
  const typename P::Group* b;
  int64_t b_step;
  int64_t steps;
  // In tile registers: from tile to tile of an operand along the sum, and across it.
  int64_t a_unit = 0, a_side = 0, b_unit = 0, b_side = 0;

  // A from rows in memory, groups as they stand.
  void take_rows(const typename P::Group* rows, int64_t row) {
    a = rows, a_row = row, a_unit = kTileSide, a_side = kTileSide * row;
  }
  const typename P::Group* a_at(int64_t r, int64_t k) const {
    if (!P::kTiles) return a + r * a_row + k * a_step;
    return a + r / kTileSide * a_side + r % kTileSide * a_row + k / kTileSide * a_unit + k % kTileSide;
  }
  const typename P::Group* b_at(int64_t k, int64_t n) const {
    if (P::kZipped) return b + k / 2 * 2 * b_step + 2 * n + k % 2;
    if (!P::kTiles) return b + k * b_step + n;
    return b + n / kTileSide * b_side + n % kTileSide + k / kTileSide * b_unit + k % kTileSide * b_step;
  }
  // A vector of groups of a slice of B in that place, n at the beginning of one.
  Vec<typename P::Group> b_groups(int64_t k, int64_t n, int slice) const {
    constexpr int L = kLanes<typename P::Real>;
    if constexpr (P::kZipped) {
      typename P::Group groups[L];
      for (int lane = 0; lane < L; ++lane) groups[lane] = *b_at(k, n + lane);
      return load(groups);
    } else {
      return load(b_at(k, n) + slice * kTileGroups);
    }
  }
};

// The sums of one register tile: `steps` steps from those places of the operands on.
template <class P, int kRows, int kColumns>
TFORMER_INLINE void multiply_tile(const ProductOperands<P>& m, const typename P::Group* a, const typename P::Group* b,
                                  int64_t steps, Vec<typename P::Real> (&acc)[kRows][kColumns]) {
  using Real = typename P::Real;
  using Group = typename P::Group;
  constexpr int L = kLanes<Real>;
#if TFORMER_HAS_BF16_BLOCKS
  if constexpr (P::kZipped) {  // of operands in vectors groups follow each other along a row or down a column
    return m.a_step == 1 ? multiply_blocks<true>(a, m.a_row, 1, b, m.b_step, steps, acc)
                         : multiply_blocks<false>(a, 1, m.a_step, b, m.b_step, steps, acc);
  }
#endif
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) acc[r][n] = Vec<Real>{};
  }
  const int64_t a_row = m.a_row, a_step = m.a_step, b_step = m.b_step;
#pragma GCC unroll 2
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
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

// Where element (r, column) of sums lies: in rows of so many columns; for tile registers, if they are kept longer than
// for a row tile, as tiles one behind the other, which take less time to load and store than rows of them far apart.
template <class P>
constexpr int64_t sums_place(int64_t r, int64_t column, int64_t columns) {
  if (!P::kTiles) return r * columns + column;
  return r / kTileSide * kTileSide * columns + column / kTileSide * kTileSide * kTileSide + r % kTileSide * kTileSide +
         column % kTileSide;
}

// The place in C of element (r, column) of its sums.
template <class Into>
TFORMER_INLINE int64_t place_in(const Into& into, int64_t r, int64_t column) {
  if (!Into::kTiles) return r * into.c_row + column;
  return r / kTileSide * into.c_below + r % kTileSide * into.c_row + column / kTileSide * into.c_side +
         column % kTileSide;
}

// Where the sums of a product go: into C. A tile's first row and column are those of its place in the product.
template <class P>
struct IntoSums {
  using Real = typename P::Real;
  static constexpr int L = kLanes<Real>;
  static constexpr bool kTiles = P::kTiles;
  Real* c;
  int64_t c_row;
  bool accumulate;
  int64_t c_side = kTileSide, c_below = kTileSide * c_row;  // of tiles: from one to the next along the row, down
  // C as sums_place has it.
  static IntoSums kept(Real* c, int64_t columns, bool accumulate) {
    if (!P::kTiles) return {c, columns, accumulate};
    return {c, kTileSide, accumulate, kTileSide * kTileSide, kTileSide * columns};
  }
  bool wants_empty(int64_t) const { return !accumulate; }  // the row tile from r, of a product without steps
  // Whether there are earlier sums of the row tile from r in C; whether the new ones stay there.
  bool adds(int64_t) const { return accumulate; }
  bool stays(int64_t) const { return true; }
  template <int kColumns>
  void leave(int64_t, int64_t, const Vec<Real> (&)[kColumns]) const {}
  template <int kRows, int kColumns>
  TFORMER_INLINE void fetch_places(int64_t, int64_t) const {}

  template <int kRows, int kColumns>
  TFORMER_INLINE void operator()(int64_t r, int64_t column, const Vec<Real> (&sums)[kRows][kColumns]) const {
    Real* to = c + place_in(*this, r, column);
    const int64_t row = c_row;
    const bool add = accumulate;  // copies: a store could change the members
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i, to += row) {
      if (add) {
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; ++n) store(to + n * L, load(to + n * L) + sums[i][n]);
      } else {
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; ++n) store(to + n * L, sums[i][n]);
      }
    }
  }
};

// How far the sums of a row tile have come: whether C holds some; whether the next product is the last one.
constexpr uint8_t kNothing = 0, kSums = 1, kLast = 2, kWritten = 4;

// Where they go: those of row tiles that have come to the last product into rows in memory, times a factor for each
// row (or none), narrowed; the others into C.
template <class P, class T>
struct IntoRows {
  using Real = typename P::Real;
  static constexpr int L = kLanes<Real>, kTileRows = P::kTileRows;
  static constexpr bool kTiles = P::kTiles;
  Real* c;
  int64_t c_row;
  uint8_t* progress;  // of each row tile
  T* rows;
  int64_t row, width;
  const Real* factors;
  bool fetches = false;                                     // asks for a place in memory before the product for it
  int64_t c_side = kTileSide, c_below = kTileSide * c_row;  // as in IntoSums
  bool wants_empty(int64_t r) const { return progress[r / kTileRows] & kLast; }
  bool adds(int64_t r) const { return progress[r / kTileRows] & kSums; }
  bool stays(int64_t r) const { return !(progress[r / kTileRows] & kLast); }
  // C as sums_place has it.
  static IntoRows kept(Real* c, int64_t columns, uint8_t* progress, T* rows, int64_t row, int64_t width) {
    if (!P::kTiles) return {c, columns, progress, rows, row, width, nullptr, true};
    return {c, kTileSide, progress, rows, row, width, nullptr, true, kTileSide * kTileSide, kTileSide * columns};
  }
  // After the product: a row tile with or without steps.
  void advance(int64_t r, bool steps) const {
    uint8_t& p = progress[r / kTileRows];
    p = p & (kLast | kWritten) ? kWritten : (steps ? kSums : p);
  }

  template <int kRows, int kColumns>
  TFORMER_INLINE void operator()(int64_t r, int64_t column, const Vec<Real> (&sums)[kRows][kColumns]) const {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) take_row(r + i, column, sums[i]);
  }

  // The places in memory of a register tile, if its sums leave for there.
  template <int kRows, int kColumns>
  TFORMER_INLINE void fetch_places(int64_t r, int64_t column) const {
    if (!fetches || !(progress[r / kTileRows] & kLast)) return;
    const T* to = rows + r * row + column;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i, to += row) fetch_row_to_write(to, kColumns * L);
  }

  // The sums of row r for its place in memory.
  template <int kColumns>
  TFORMER_INLINE void leave(int64_t r, int64_t column, Vec<Real> (&x)[kColumns]) const {
    if (factors) {
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) x[n] *= factors[r];
    }
    T* to = rows + r * row + column;
    if (const int64_t left = width - column; left >= kColumns * L) {
#pragma GCC unroll 2
      for (int n = 0; n + 1 < kColumns; n += 2) store_two_as<Real>(to + n * L, x[n], x[n + 1]);
      if constexpr (kColumns % 2 != 0) store_as<Real>(to + (kColumns - 1) * L, x[kColumns - 1]);
    } else {
      for (int n = 0; n * L < left; ++n) {
        if (left - n * L >= L) {
          store_as<Real>(to + n * L, x[n]);
        } else {
          store_as<Real>(to + n * L, x[n], left - n * L);
        }
      }
    }
  }

 private:
  template <int kColumns>
  TFORMER_INLINE void take_row(int64_t r, int64_t column, const Vec<Real> (&sums)[kColumns]) const {
    const uint8_t have = progress[r / kTileRows];
    Real* sum = c + place_in(*this, r, column);
    Vec<Real> x[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) x[n] = have & kSums ? load(sum + n * L) + sums[n] : sums[n];
    if (have & kLast) return leave(r, column, x);
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) store(sum + n * L, x[n]);
  }
};

template <class P, int kRows, int kColumns, class Into>
__attribute__((noinline)) void register_tile(const ProductOperands<P>& m, const typename P::Group* a,
                                             const typename P::Group* b, int64_t steps, int64_t r, int64_t column,
                                             const Into& into) {
  Vec<typename P::Real> acc[kRows][kColumns];
  into.template fetch_places<kRows, kColumns>(r, column);
  multiply_tile<P>(m, a, b, steps, acc);
  into(r, column, acc);
}

template <class P, int kRows, class Into, class... Place>
TFORMER_INLINE void register_tile_columns(int columns, const ProductOperands<P>& m, const Into& into, Place... place) {
  if (columns == 1) return register_tile<P, kRows, 1>(m, place..., into);
  if (columns == 2) return register_tile<P, kRows, 2>(m, place..., into);
  if constexpr (P::kTileColumns > 2) {
    if (columns == 3) return register_tile<P, kRows, 3>(m, place..., into);
    if (columns == 4) return register_tile<P, kRows, 4>(m, place..., into);
  }
}

// Pieces of other work, spread evenly over so many products.
class EvenShare {
 public:
  EvenShare(int64_t pieces, int64_t products)
      : share_(products > 0 ? (pieces * kWhole + products - 1) / products : 0) {}
  // After a product: the pieces that are due.
  template <class MakeOne>
  TFORMER_INLINE void after_one(MakeOne&& make_one) {
    for (due_ += share_; due_ >= kWhole; due_ -= kWhole) make_one();
  }

 private:
  static constexpr int64_t kWhole = 65536;
  int64_t share_, due_ = 0;
};

#if TFORMER_HAS_TILES
// A register tile in tile registers: 0 to 3 hold the sums, 4 and 5 come from A, 6 and 7 from B. beside() is called
// after every instruction: the CPU does there what it has beside these products, until their sums are stored.
template <class P, int kRowTiles, int kColumnTiles, class Into, class Beside>
TFORMER_INLINE void tile_registers(int64_t rows, const ProductOperands<P>& m, const Into& into, Beside&& beside,
                                   const typename P::Group* a, const typename P::Group* b, int64_t steps, int64_t r,
                                   int64_t column) {
  constexpr bool kBelow = kRowTiles == 2, kBeside = kColumnTiles == 2;
  const int64_t a_row = m.a_row * 4, b_row = m.b_step * 4;
  float* c = into.c + place_in(into, r, column);
  const auto each = [](float* place, int64_t row_floats, int64_t side, int64_t down, auto&& f) TFORMER_LAMBDA {
    using std::integral_constant;
    float* below = place + down;
    f(integral_constant<int, 0>{}, place, row_floats * 4);
    if constexpr (kBeside) f(integral_constant<int, 1>{}, place + side, row_floats * 4);
    if constexpr (kBelow) f(integral_constant<int, 2>{}, below, row_floats * 4);
    if constexpr (kBelow && kBeside) f(integral_constant<int, 3>{}, below + side, row_floats * 4);
  };
  const auto each_of_c = [&](auto&& f) TFORMER_LAMBDA { each(c, into.c_row, into.c_side, into.c_below, f); };
  // a running total of many small terms would lose more than float32 sums may: those of slices are added as one
  const bool adds = into.adds(r), adds_once = P::kSlices > 1 && adds;
  if (adds && !adds_once) {
    each_of_c([](auto tile, float* from, int64_t row) TFORMER_LAMBDA { tile_load<tile>(from, row); });
  } else {
    each_of_c([](auto tile, float*, int64_t) TFORMER_LAMBDA { tile_zero<tile>(); });
  }
  using T = Terms<P::kSlices>;
  for (int64_t k = 0; k < steps; k += kTileSide, a += m.a_unit, b += m.b_unit) {
#pragma GCC unroll 6
    for (int t = 0; t < T::kCount; ++t) {
      const bool new_a = t == 0 || T::kA[t] != T::kA[t - 1], new_b = t == 0 || T::kB[t] != T::kB[t - 1];
      const auto* a_part = a + T::kA[t] * kTileGroups;
      const auto* b_part = b + T::kB[t] * kTileGroups;
      if (new_a) tile_load<4>(a_part, a_row);
      if (new_b) tile_load<6>(b_part, b_row);
      tile_multiply_add<0, 4, 6>();
      beside();
      if constexpr (kBeside) {
        if (new_b) tile_load<7>(b_part + m.b_side, b_row);
        tile_multiply_add<1, 4, 7>();
        beside();
      }
      if constexpr (kBelow) {
        if (new_a) tile_load<5>(a_part + m.a_side, a_row);
        tile_multiply_add<2, 5, 6>();
        beside();
        if constexpr (kBeside) {
          tile_multiply_add<3, 5, 7>();
          beside();
        }
      }
    }
  }
  const auto store_tile = [](auto tile, float* to, int64_t row) TFORMER_LAMBDA { tile_store<tile>(to, row); };
  const bool stays = into.stays(r);
  if (stays && !adds_once) return each_of_c(store_tile);
  alignas(64) float sums[kRowTiles * kTileSide][kColumnTiles * kTileSide];
  each(sums[0], kColumnTiles * kTileSide, kTileSide, kTileSide * kColumnTiles * kTileSide, store_tile);
  for (int64_t i = 0; i < rows; ++i) {
    F x[kColumnTiles];
    std::memcpy(x, sums[i], sizeof(x));
    float* const before = c + place_in(into, i, 0);
    for (int n = 0; adds_once && n < kColumnTiles; ++n) x[n] += load(before + n * into.c_side);
    if (stays) {
      for (int n = 0; n < kColumnTiles; ++n) store(before + n * into.c_side, x[n]);
    } else {
      into.leave(r + i, column, x);
    }
  }
}

template <class P, class Into, class Beside, class... Place>
__attribute__((noinline)) void tile_product(int64_t rows, int columns, const ProductOperands<P>& m, const Into& into,
                                            Beside&& beside, Place... place) {
  if (rows > kTileSide) {
    return columns == 2 ? tile_registers<P, 2, 2>(rows, m, into, beside, place...)
                        : tile_registers<P, 2, 1>(rows, m, into, beside, place...);
  }
  return columns == 2 ? tile_registers<P, 1, 2>(rows, m, into, beside, place...)
                      : tile_registers<P, 1, 1>(rows, m, into, beside, place...);
}
#endif

// f(rows) with the rows of a tile of vectors, 1 to kTileRows, as a constant.
template <class P, class F>
TFORMER_INLINE auto with_tile_rows(int64_t rows, F&& f) {
  using std::integral_constant;
  static_assert(P::kTiles || P::kTileRows == 6);
  switch (rows) {
    case 1:
      return f(integral_constant<int, 1>{});
    case 2:
      return f(integral_constant<int, 2>{});
    case 3:
      return f(integral_constant<int, 3>{});
    case 4:
      return f(integral_constant<int, 4>{});
    case 5:
      return f(integral_constant<int, 5>{});
    default:
      return f(integral_constant<int, P::kTileRows>{});
  }
}

// A register tile of 1 to kTileRows rows and 1 to kTileColumns vectors; place: a, b, steps, first row, first column.
template <class P, class Into, class... Place>
TFORMER_INLINE void register_tile_rows(int64_t rows, int columns, const ProductOperands<P>& m, const Into& into,
                                       Place... place) {
#if TFORMER_HAS_TILES
  if constexpr (P::kTiles) {
    tile_product(rows, columns, m, into, []() TFORMER_LAMBDA {}, place...);
  } else
#endif
    with_tile_rows<P>(rows,
                      [&](auto count) TFORMER_LAMBDA { register_tile_columns<P, count>(columns, m, into, place...); });
}

// Steps [begin, end) of a sum.
struct Steps {
  int64_t begin, end;
};

// The sums of A B (rows x columns) to where `into` says; columns is a whole number of vectors. steps_of(r): those of
// the sums of the row tile from r, where the others are known to be 0. beside() is called after each register tile.
template <class P, class Into, class StepsOf, class Beside>
void product(const ProductOperands<P>& m, int64_t rows, int64_t columns, const Into& into, StepsOf&& steps_of,
             Beside&& beside) {
  constexpr int L = kLanes<typename P::Real>, kTileRows = P::kTileRows, kTileColumns = P::kTileColumns;
  const int64_t vectors = columns / L;
  const int64_t strips = (vectors + kTileColumns - 1) / kTileColumns;
  for (int64_t strip = 0; strip < strips; ++strip) {  // near-equal strips: 5 vectors are 3 + 2, not 4 + 1
    const int64_t first = vectors * strip / strips, last = vectors * (strip + 1) / strips;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Steps sum = steps_of(r);
      const int64_t steps = sum.begin < sum.end ? sum.end - sum.begin : 0;
      if (steps == 0 && !into.wants_empty(r)) continue;
      register_tile_rows<P>(rows - r < kTileRows ? rows - r : kTileRows, static_cast<int>(last - first), m, into,
                            m.a_at(r, sum.begin), m.b_at(sum.begin, first * L), steps, r, first * L);
      beside();
    }
  }
}

template <class P, class Into>
void product(const ProductOperands<P>& m, int64_t rows, int64_t columns, const Into& into) {
  const auto all = [&](int64_t) TFORMER_LAMBDA { return Steps{0, m.steps}; };
  product<P>(m, rows, columns, into, all, []() TFORMER_LAMBDA {});
}

// What a term of a product must not be added for: at[r * row + k * step + n * column], k counting elements.
struct Hidden {
  const uint8_t* at;
  int64_t row, step, column;
};

// The same product without hidden terms. Taken only where there are inf or NaN, which a weight of zero, or a slice that
// is zero, would turn into NaN.
template <class P, class Into>
void product_without_hidden(const ProductOperands<P>& m, int64_t rows, int64_t columns, const Into& into,
                            const Hidden& hidden) {
  using Real = typename P::Real;
  using Group = typename P::Group;
  constexpr int L = kLanes<Real>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < columns; n += L) {
      Vec<Real> acc[1][1] = {};
      for (int64_t k = 0; k < m.steps; ++k) {
        for (int i = 0; i < P::kStep; ++i) {
          Vec<Real> counts = splat(Real(1));
          for (int lane = 0; hidden.at && lane < L; ++lane) {
            const int64_t term = r * hidden.row + (k * P::kStep + i) * hidden.step + (n + lane) * hidden.column;
            counts[lane] = hidden.at[term] ? Real(0) : Real(1);
          }
          Real x{};
          Vec<Real> y{};
          for (int slice = P::kSlices - 1; slice >= 0; --slice) {
            Group a;
            std::memcpy(&a, m.a_at(r, k) + slice * kTileGroups, sizeof(a));
            x += P::element(a, i), y += P::elements(m.b_groups(k, n, slice), i);
          }
          acc[0][0] = (counts == 0) ? acc[0][0] : x * y + acc[0][0];
        }
      }
      into(r, n, acc);
    }
  }
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
