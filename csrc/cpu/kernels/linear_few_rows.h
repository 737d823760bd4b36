// y = x weightT + bias for a few rows of x: a product that waits for its weights. They are read once, in the order in
// which they lie, nothing is packed, and sums are kept in float.
#pragma once

#include "../../params.h"
#include "vec_bf16_pairs.h"
#include "vec_bf16_products.h"

namespace tformer::TFORMER_ISA {
namespace {

// T: type of x, weight, bias and y.
template <class T>
struct LinearFewRows {
  static constexpr int L = kLanes<float>;
  static constexpr int kColumns = 4, kRows = 4;  // of a register tile of sums
  static constexpr bool kPairs = __is_same(T, bf16);
  static constexpr int kVectors = kPairs ? 2 : 1;  // of floats, that are read at once: bf16 as even and odd elements
  static constexpr int kStep = kVectors * L;
  static constexpr int kLine = 64;

  const LinearParams& p;
  const T* x;
  const T* weight;
  const T* bias;
  T* y;

  explicit LinearFewRows(const LinearParams& params)
      : p(params),
        x(static_cast<const T*>(p.x)),
        weight(static_cast<const T*>(p.weight)),
        bias(static_cast<const T*>(p.bias)),
        y(static_cast<T*>(p.y)) {}

  // Columns [begin, end) of y, or of the sums of a part.
  void run(int64_t part, int64_t begin, int64_t end) const {
    if (p.weight_stride[1] == 1) {
      for (int64_t n = begin; n < end; n += kColumns) {
        for_rows([&](auto rows, int64_t m) TFORMER_LAMBDA { dot_products<rows>(m, n, end); });
      }
    } else {
      const int64_t most = kSums / p.M / kStep * kStep;
      for (int64_t n = begin; n < end; n += most) weighted_rows(part, n, n + most < end ? n + most : end);
    }
  }

 private:
  static constexpr int kSums = 4096;  // floats: half of an L1 of 32 KB, the other half is for weights

  // Elements as they enter products.
  static constexpr bool kMultipliesPairs = kPairs && TFORMER_HAS_BF16_PRODUCTS;
  struct Widened {
    F v[kVectors];
  };
  using Operand = std::conditional_t<kMultipliesPairs, U32, Widened>;
  using Factor = std::conditional_t<kMultipliesPairs, U32, F>;

  static TFORMER_INLINE Widened widened(const T* from) {
    Widened to;
    if constexpr (kPairs) {
      widen_even_odd(load_bytes<HalfPair>(from), to.v[0], to.v[1]);
    } else {
      to.v[0] = load_as<float>(from);
    }
    return to;
  }
  static TFORMER_INLINE Operand operand(const T* from) {
    if constexpr (kMultipliesPairs) {
      return load_bytes<U32>(from);
    } else {
      return widened(from);
    }
  }
  static TFORMER_INLINE void multiply_add(const Operand& a, const Operand& b, F& sum) {
    if constexpr (kMultipliesPairs) {
      sum = multiply_add_pairs(a, b, sum);
    } else {
      for (int v = 0; v < kVectors; ++v) sum += a.v[v] * b.v[v];
    }
  }
  // f(pointer to a whole step) of n elements, the rest of which are 0.
  template <class Read>
  static TFORMER_INLINE auto of_part(const T* from, int64_t n, Read&& f) {
    T part[kStep] = {};
    std::memcpy(part, from, static_cast<size_t>(n) * sizeof(T));
    return f(part);
  }

  // Rows of weights are streams, several of which are read side by side, and what is asked for is some way ahead in
  // each: `here` elements further on, or, from its element `last` on, `beyond`.
  struct Ahead {
    int64_t last, here, beyond;

    // Streams of `length` elements, each followed by one that lies `next` further on; there are `left` of these.
    TFORMER_INLINE Ahead(int64_t length, int64_t next, int64_t left) {
      constexpr int64_t kAhead = 2048 / static_cast<int64_t>(sizeof(T));
      const int64_t streams = kAhead / length, rest = kAhead % length;
      last = length - rest;
      here = streams <= left ? streams * next + rest : 0;
      beyond = streams + 1 <= left ? (streams + 1) * next + rest - length : 0;
    }
    TFORMER_INLINE int64_t of(int64_t at) const { return at + (at < last ? here : beyond); }
  };
  static TFORMER_INLINE void prefetch_step(const T* from) {
    for (int at = 0; at < kStep * static_cast<int>(sizeof(T)); at += kLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(from) + at);
    }
  }

  // f(number of rows, first row)
  template <class Rows>
  TFORMER_INLINE void for_rows(Rows&& f) const {
    int64_t m = 0;
    for (; m + kRows <= p.M; m += kRows) f(std::integral_constant<int, kRows>{}, m);
    if (p.M - m == 3) f(std::integral_constant<int, 3>{}, m);
    if (p.M - m == 2) f(std::integral_constant<int, 2>{}, m);
    if (p.M - m == 1) f(std::integral_constant<int, 1>{}, m);
  }

  using Four = VecN<float, 4>;
  template <int kCount>
  static TFORMER_INLINE Four folded(VecN<float, kCount> v) {
    if constexpr (kCount == 4) {
      return v;
    } else {
      VecN<float, kCount / 2> half[2];
      std::memcpy(half, &v, sizeof(v));
      return folded<kCount / 2>(half[0] + half[1]);
    }
  }
  // The sum of all lanes of each.
  static TFORMER_INLINE Four sums_of_lanes(F v0, F v1, F v2, F v3) {
    static_assert(kColumns == 4);
    const auto halves = [](Four a, Four b) TFORMER_LAMBDA {
      return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    };
    const Four first = halves(folded<L>(v0), folded<L>(v1)), second = halves(folded<L>(v2), folded<L>(v3));
    return __builtin_shufflevector(first, second, 0, 2, 4, 6) + __builtin_shufflevector(first, second, 1, 3, 5, 7);
  }
  // Four elements, of which the last may be missing.
  static TFORMER_INLINE Four four_from(const T* from, int64_t n) {
    T part[L] = {};
    n == 4 ? std::memcpy(part, from, 4 * sizeof(T)) : std::memcpy(part, from, static_cast<size_t>(n) * sizeof(T));
    const F v = load_as<float>(part);
    return load_bytes<Four>(&v);
  }
  static TFORMER_INLINE void four_to(T* to, Four v, int64_t n) {
    float wide[L] = {};
    T part[L];
    store(wide, v);
    store_as<float>(part, load(wide));
    n == 4 ? std::memcpy(to, part, 4 * sizeof(T)) : std::memcpy(to, part, static_cast<size_t>(n) * sizeof(T));
  }

  // Weights whose rows lie along K: rows of both operands multiplied element by element.
  template <int kM>
  TFORMER_INLINE void dot_products(int64_t m, int64_t n, int64_t end) const {
    const T *rows[kM], *columns[kColumns];
    for (int r = 0; r < kM; ++r) rows[r] = x + (m + r) * p.x_stride;
    // past the last column that one again, and nothing is written
    for (int u = 0; u < kColumns; ++u) columns[u] = weight + (n + u < end ? n + u : end - 1) * p.weight_stride[0];
    const Ahead ahead(p.K, kColumns * p.weight_stride[0], (p.N - n) / kColumns - 1);
    F sum[kColumns][kM] = {};
    int64_t k = 0;
    for (; k + kStep <= p.K; k += kStep) {
      Operand a[kM];
      for (int r = 0; r < kM; ++r) a[r] = operand(rows[r] + k);
      const int64_t place = ahead.of(k);
      for (int u = 0; u < kColumns; ++u) {
        if (m == 0) prefetch_step(columns[u] + place);
        const Operand b = operand(columns[u] + k);
        for (int r = 0; r < kM; ++r) multiply_add(a[r], b, sum[u][r]);
      }
    }
    if (k < p.K) {
      const auto read = [](const T* from) TFORMER_LAMBDA { return operand(from); };
      for (int u = 0; u < kColumns; ++u) {
        const Operand b = of_part(columns[u] + k, p.K - k, read);
        for (int r = 0; r < kM; ++r) multiply_add(of_part(rows[r] + k, p.K - k, read), b, sum[u][r]);
      }
    }
    const int64_t count = end - n < kColumns ? end - n : kColumns;
    const Four add = bias ? four_from(bias + n, count) : Four{};
    for (int r = 0; r < kM; ++r) {
      const Four total = sums_of_lanes(sum[0][r], sum[1][r], sum[2][r], sum[3][r]) + add;
      four_to(y + (m + r) * p.N + n, total, count);
    }
  }

  // Weights whose rows lie along N: four rows of a part at a time, times an element of x each, are added to sums in L1.
  // Those of the first part take the bias along.
  void weighted_rows(int64_t part, int64_t begin, int64_t end) const {
    constexpr int kTogether = 4;
    alignas(64) float sums[kSums];
    const int64_t width = end - begin, padded = (width + kStep - 1) / kStep * kStep;
    for (int64_t n = 0; n < p.M * padded; ++n) sums[n] = 0;
    int64_t k = part * p.part_rows;
    const int64_t k_end = k + p.part_rows < p.K ? k + p.part_rows : p.K;
    for (; k + kTogether <= k_end; k += kTogether) {
      for_rows([&](auto rows, int64_t m) TFORMER_LAMBDA { add_rows<rows, kTogether>(m, k, begin, width, sums); });
    }
    for (; k < k_end; ++k) {
      for_rows([&](auto rows, int64_t m) TFORMER_LAMBDA { add_rows<rows, 1>(m, k, begin, width, sums); });
    }
    for (int64_t m = 0; m < p.M; ++m) {
      float *row = sums + m * padded, *to = p.parts + (part * p.M + m) * p.N + begin;
      for (int64_t n = 0; n < width; n += kStep) {
        const int64_t count = width - n < kStep ? width - n : kStep;
        F v[kVectors];
        for (int i = 0; i < kVectors; ++i) v[i] = load(row + n + i * L);
        if constexpr (kPairs) merge_even_odd(v[0], v[1]);
        for (int i = 0; i < kVectors && i * L < count; ++i) {
          const int64_t whole = count - i * L < L ? count - i * L : L;
          if (bias && part == 0) v[i] += load_as<float>(bias + begin + n + i * L, whole);
          whole == L ? store(to + n + i * L, v[i]) : store_as<float>(to + n + i * L, v[i], whole);
        }
      }
    }
  }
  template <int kM, int kTogether>
  TFORMER_INLINE void add_rows(int64_t m, int64_t k, int64_t begin, int64_t width, float* sums) const {
    const int64_t padded = (width + kStep - 1) / kStep * kStep, stride = p.weight_stride[1];
    constexpr int kFactors = kMultipliesPairs ? (kTogether + 1) / 2 : kTogether;
    Factor factor[kM][kFactors];
    for (int r = 0; r < kM; ++r) {
      const T* row = x + (m + r) * p.x_stride + k;
      for (int i = 0; i < kFactors; ++i) {
        if constexpr (kMultipliesPairs) {
          const uint32_t second = kTogether > 1 ? row[2 * i + 1].bits : 0;
          factor[r][i] = U32{} + (row[2 * i].bits | second << 16);
        } else {
          factor[r][i] = splat(load_as<float>(row + i, 1)[0]);
        }
      }
    }
    const T* from = weight + k * stride + begin;
    const Ahead ahead(width, kTogether * stride, (p.K - k) / kTogether - 1);
    const auto add = [&](int64_t n, auto&& read) TFORMER_LAMBDA {
      F sum[kM][kVectors];
      for (int r = 0; r < kM; ++r) {
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + (m + r) * padded + n + v * L);
      }
      for (int i = 0; i < kFactors; ++i) {
        if constexpr (kMultipliesPairs) {
          // elements of two rows become pairs, of even columns and of odd ones
          const U32 first = read(from + 2 * i * stride + n);
          const U32 second = kTogether > 1 ? read(from + (2 * i + 1) * stride + n) : U32{};
          const U32 pair[] = {(first & 0xffff) | second << 16, first >> 16 | (second & 0xffff0000u)};
          for (int r = 0; r < kM; ++r) {
            for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add_pairs(factor[r][i], pair[v], sum[r][v]);
          }
        } else {
          const Widened w = read(from + i * stride + n);
          for (int r = 0; r < kM; ++r) {
            for (int v = 0; v < kVectors; ++v) sum[r][v] += factor[r][i] * w.v[v];
          }
        }
      }
      for (int r = 0; r < kM; ++r) {
        for (int v = 0; v < kVectors; ++v) store(sums + (m + r) * padded + n + v * L, sum[r][v]);
      }
    };
    int64_t n = 0;
    for (; n + kStep <= width; n += kStep) {
      const int64_t place = ahead.of(n);
      for (int i = 0; i < kTogether && m == 0; ++i) prefetch_step(from + i * stride + place);
      add(n, [](const T* at) TFORMER_LAMBDA { return operand(at); });
    }
    if (n < width) {
      add(n, [&](const T* at) TFORMER_LAMBDA {
        return of_part(at, width - n, [](const T* part) TFORMER_LAMBDA { return operand(part); });
      });
    }
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
