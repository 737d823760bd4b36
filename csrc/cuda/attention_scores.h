// From products q.k to scores, from scores to weights; dropout. All kernels of both directions call this.
#pragma once

#include <type_traits>

#include "../key_range.h"
#include "../philox.h"
#include "attention_products.h"

namespace tformer::gpu {

// Positions inside a sequence are int in kernels: registers are short.
struct Positions {
  int q_begin, k_begin;  // rows of packed tensors
  int Sq, Sk;

  TFORMER_DEVICE explicit Positions(const Sequence& s)
      : q_begin(static_cast<int>(s.q_begin)),
        k_begin(static_cast<int>(s.k_begin)),
        Sq(static_cast<int>(s.Sq)),
        Sk(static_cast<int>(s.Sk)) {}
};

template <class R>
constexpr R kInfinity = static_cast<R>(__builtin_inf());

// Weights of 16-bit elements are powers of 2 (one instruction), those of float and double of e.
template <class T>
struct Exponent {
  static constexpr float kUnit = 1.4426950408889634f;  // of e^x = 2^(x kUnit)
  static TFORMER_DEVICE float power(float x) { return exp2_fast(x); }
  static TFORMER_DEVICE float of(float x) { return log2(x); }
  static TFORMER_DEVICE float natural(float x) { return x * 0.6931471805599453f; }
};
template <>
struct Exponent<float> {
  static constexpr float kUnit = 1;
  static TFORMER_DEVICE float power(float x) { return exp(x); }
  static TFORMER_DEVICE float of(float x) { return log(x); }
  static TFORMER_DEVICE float natural(float x) { return x; }
};
template <>
struct Exponent<double> {
  static constexpr double kUnit = 1;
  static TFORMER_DEVICE double power(double x) { return exp(x); }
  static TFORMER_DEVICE double of(double x) { return log(x); }
  static TFORMER_DEVICE double natural(double x) { return x; }
};

// An element of any floating dtype.
template <class R>
TFORMER_DEVICE R read_element(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f64:
      return static_cast<R>(static_cast<const double*>(data)[at]);
    case DType::bf16:
      return static_cast<R>(widen(static_cast<const bf16*>(data)[at]));
    case DType::f16:
      return static_cast<R>(widen(static_cast<const f16*>(data)[at]));
    default:
      return static_cast<R>(static_cast<const float*>(data)[at]);
  }
}

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
template <>
constexpr DType kDType<bf16> = DType::bf16;
template <>
constexpr DType kDType<f16> = DType::f16;

struct Pair {
  int i, j;  // query, key
};

// The scores of one (batch, query head). kPlain: nothing but the scale, the range of keys and a mask by keys; products
// are then scores but for a factor, which waits for the exponent.
template <class T, bool kPlain>
struct Scores {
  using R = Real<T>;
  const AttentionParams& p;
  KeyRangeOf<int> range;
  int Sq;
  R scale, inner;  // inner: of what tanh is taken
  R slope;         // of ALiBi
  R unit;          // positive; score * unit is the exponent
  int64_t bias_offset, mask_offset;

  TFORMER_DEVICE Scores(const AttentionParams& params, const Sequence& s, int b, int h)
      : p(params),
        range(params, s),
        Sq(static_cast<int>(s.Sq)),
        scale(static_cast<R>(params.scale)),
        inner(static_cast<R>(params.softcap != 0 ? params.scale / params.softcap : 0)),
        slope(params.alibi_slopes
                  ? static_cast<R>(params.alibi_slopes[b * params.alibi_stride[0] + h * params.alibi_stride[1]])
                  : 0),
        unit(kPlain ? scale * Exponent<T>::kUnit : Exponent<T>::kUnit),
        bias_offset(b * params.bias.stride[0] + h * params.bias.stride[1]),
        mask_offset(b * params.mask.stride[0] + h * params.mask.stride[1]) {}

  // weight(x, held(m)) = e^(x - m). Plain scores: one multiply-add. With operands added, the difference first: a bias
  // may be the most negative number, which no factor must make infinite.
  TFORMER_DEVICE R held(R m) const { return kPlain ? m * unit : m; }
  TFORMER_DEVICE R weight(R x, R held) const {
    return Exponent<T>::power(kPlain ? fma(x, unit, -held) : (x - held) * unit);
  }
  // lse of a row, as weight takes it; a row without a visible key has no weights.
  TFORMER_DEVICE R held_lse(R lse) const {
    return lse == -kInfinity<R> ? kInfinity<R> : kPlain ? lse * Exponent<T>::kUnit : lse;
  }
  TFORMER_DEVICE R natural(R x) const { return kPlain ? x * scale : x; }

  // Whether every query of [i0, i1) sees every key of [j0, j1).
  TFORMER_DEVICE bool all_visible(int i0, int i1, int j0, int j1) const {
    return i1 <= Sq && range.begin(i1 - 1) <= j0 && range.end(i0) >= j1;
  }

  // What a mask by keys says of key j.
  TFORMER_DEVICE bool shows_key(int j) const {
    return !p.mask.data || static_cast<const char*>(p.mask.data)[mask_offset + j * p.mask.stride[3]] != 0;
  }

  // The score of query i and key j, which position lets through; -inf where it takes no part. `cap` receives the
  // derivative of the softcap.
  TFORMER_DEVICE R score(R product, int i, int j, R& cap) const {
    cap = 1;
    if constexpr (kPlain) {
      return shows_key(j) ? product : -kInfinity<R>;
    } else {
      R x = product * scale;
      if (p.softcap != 0) {
        const R t = tanh(product * inner);
        x = static_cast<R>(p.softcap) * t;
        cap = 1 - t * t;
      }
      if (p.bias.data) {
        x += read_element<R>(p.bias.data, p.bias.dtype, bias_offset + i * p.bias.stride[2] + j * p.bias.stride[3]);
      }
      if (p.alibi_slopes) x -= slope * absolute(static_cast<R>(range.diagonal(i) - j));
      if (p.mask.data) {
        const auto* mask = static_cast<const char*>(p.mask.data) + mask_offset;
        if (!mask[i * p.mask.stride[2] + j * p.mask.stride[3]]) x = -kInfinity<R>;
      }
      return x;
    }
  }

  // f(whether add_operands can make the scores of a tile, as a type): not with a softcap, whose derivative each pair
  // wants, nor with a bias of another dtype. Double takes long to compile.
  template <class F>
  TFORMER_DEVICE void for_operands(F&& f) const {
    if constexpr (sizeof(T) != 8) {
      if (p.softcap == 0 && (!p.bias.data || p.bias.dtype == kDType<T>)) return f(std::true_type{});
    }
    f(std::false_type{});
  }

  // A pair that is there, and near; where positions do not meet it does not matter what an operand holds.
  TFORMER_DEVICE Pair nearest(Pair pair) const { return {smaller(pair.i, Sq - 1), smaller(pair.j, range.Sk - 1)}; }

  // Products become scores, operand by operand: one question for the whole tile, and no read that waits behind a branch
  // for its pair. at(r, c): the pair of s[r][c], which may be hidden by position, or not be there.
  template <int kRows, int kColumns, class At>
  TFORMER_DEVICE void add_operands(R (&s)[kRows][kColumns], At&& at) const {
    const auto for_each = [&](auto&& f) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) f(s[r][c], nearest(at(r, c)));
      }
    };
    if (p.bias.data) {
      const T* bias = static_cast<const T*>(p.bias.data) + bias_offset;
      for_each(
          [&](R& x, Pair of) { x = fma(x, scale, widen(bias[of.i * p.bias.stride[2] + of.j * p.bias.stride[3]])); });
    } else {
      multiply_all(s, scale);
    }
    if (p.alibi_slopes) {
      for_each([&](R& x, Pair of) { x -= slope * absolute(static_cast<R>(range.diagonal(of.i) - of.j)); });
    }
    if (p.mask.data) {
      const auto* mask = static_cast<const char*>(p.mask.data) + mask_offset;
      for_each([&](R& x, Pair of) { x = mask[of.i * p.mask.stride[2] + of.j * p.mask.stride[3]] ? x : -kInfinity<R>; });
    }
  }
};

template <class R>
TFORMER_DEVICE R sink_of(const AttentionParams& p, int64_t h) {
  return read_element<R>(p.sinks, p.sinks_dtype, h);
}

// A mask by keys, where there is one: scores of the keys that it hides, kC * 4 of them from key0 on, become -inf.
template <class P, class T, bool kPlain, int kLaneRows, int kC>
TFORMER_DEVICE void hide_keys(const Scores<T, kPlain>& scores, float (&s)[kLaneRows][kC], int key0) {
  if (!scores.p.mask.data) return;
  constexpr int kKeys = 4 * kC;
#pragma unroll
  for (int first = 0; first < kKeys; first += kWarp) {  // a lane asks for a key
    const int j = key0 + first + lane();
    const uint32_t shown = ballot(first + lane() >= kKeys || j >= scores.range.Sk || scores.shows_key(j));
    if (shown == ~uint32_t{0}) continue;
    const uint32_t of_lane = shown >> P::first_column();  // which is less than 8
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const int offset = P::column_offset(c) - first;
      if (offset < 0 || offset >= kWarp) continue;
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) s[r][c] = of_lane >> offset & 1 ? s[r][c] : -kInfinity<float>;
    }
  }
}

// Scores of rows row0 and after become final: -inf where query and key do not meet, by position or by an operand. Keys
// from key0 on; only those of [key_begin, key_end) count. P: how products spread rows and columns over lanes. A mask by
// keys of plain scores is hide_keys' affair.
template <class P, class T, bool kPlain, int kLaneRows, int kC>
TFORMER_DEVICE void finish_scores(const Scores<T, kPlain>& scores, Real<T> (&s)[kLaneRows][kC], int b, int row0,
                                  int key0, int key_begin, int key_end) {
  using R = Real<T>;
  const int lane_key0 = key0 + P::first_column();
  // made anew, since most tiles do without: registers are short
  const auto range = KeyRangeOf<int>(scores.p, sequence_of(scores.p, b)).from_key(lane_key0);
  // f(r, c, i, j - lane_key0, whether the positions meet)
  const auto for_pairs = [&](auto&& f) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int i = row0 + P::row(r);
      const int begin = larger(range.begin(i), key_begin - lane_key0);
      const int end = i < scores.Sq ? smaller(range.end(i), key_end - lane_key0) : 0;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const int j = P::column_offset(c);
        f(r, c, i, j, j >= begin && j < end);
      }
    }
  };
  if constexpr (kPlain) {
    for_pairs([&](int r, int c, int, int, bool meet) { s[r][c] = meet ? s[r][c] : -kInfinity<R>; });
  } else {
    scores.for_operands([&](auto by_tile) {
      constexpr bool kByTile = decltype(by_tile)::value;
      if constexpr (kByTile) {
        scores.add_operands(s, [&](int r, int c) { return Pair{row0 + P::row(r), lane_key0 + P::column_offset(c)}; });
      }
      for_pairs([&](int r, int c, int i, int j, bool meet) {
        R x = s[r][c], cap;
        if constexpr (!kByTile) {
          const Pair of = scores.nearest({i, lane_key0 + j});
          x = scores.score(x, of.i, of.j, cap);
        }
        s[r][c] = meet ? x : -kInfinity<R>;
      });
    });
  }
}

// Softmax of rows as they grow: weight = e^(x - m), l = sum of the weights (Milakov & Gimelshein 2018). m is a score,
// after finish natural; l is this lane's part until then. m follows the maximum only when that has left it behind by
// 2^kBehind, in weights: any m near the maximum does, and what was summed before is seldom multiplied anew.
template <class T, int kLaneRows, bool kPlain>
struct OnlineSoftmax {
  using R = Real<T>;
  static constexpr R kBehind = 8 * (Exponent<T>::kUnit == 1 ? R(0.6931471805599453) : R(1));
  R m[kLaneRows], l[kLaneRows];

  TFORMER_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) m[r] = -kInfinity<R>, l[r] = 0;
  }

  // Scores become weights; o, what was summed before, is brought to the new maximum, where there is one in the warp.
  template <int kC, int kO>
  TFORMER_DEVICE void update(const Scores<T, kPlain>& scores, R (&s)[kLaneRows][kC], R (&o)[kLaneRows][kO]) {
    R rescale[kLaneRows];
    if (any(weigh(scores, s, rescale))) multiply_rows_by(o, rescale);
  }

  // Scores become weights; what was summed before is then to be multiplied by `rescale`. Returns whether that is not 1.
  template <int kC>
  TFORMER_DEVICE bool weigh(const Scores<T, kPlain>& scores, R (&s)[kLaneRows][kC], R (&rescale)[kLaneRows]) {
    bool grown = false;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      R top[2] = {s[r][0], s[r][1]};  // two chains: each step waits for the one before
#pragma unroll
      for (int c = 2; c < kC; ++c) top[c % 2] = maximum(top[c % 2], s[r][c]);
      const R highest = quad_maximum(maximum(top[0], top[1]));
      rescale[r] = 1;
      if ((highest - m[r]) * scores.unit > kBehind) {  // not where both are -inf: NaN
        rescale[r] = Exponent<T>::power((m[r] - highest) * scores.unit);
        m[r] = highest;
        grown = true;
      }
      const R held = scores.held(m[r] == -kInfinity<R> ? R(0) : m[r]);  // nothing visible yet: weights are e^-inf = 0
      R sum[2] = {0, 0};
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        s[r][c] = scores.weight(s[r][c], held);
        sum[c % 2] += s[r][c];
      }
      l[r] = l[r] * rescale[r] + (sum[0] + sum[1]);
    }
    return grown;
  }

  TFORMER_DEVICE void finish(const Scores<T, kPlain>& scores) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      l[r] = quad_sum(l[r]);
      m[r] = scores.natural(m[r]);
    }
  }

  // One more score that has no value: it only takes weight. Returns by what o is to be multiplied. After finish.
  TFORMER_DEVICE R add_sink(int r, R x) {
    const R m_new = maximum(m[r], x);
    const R rescale = m[r] == m_new ? R(1) : Exponent<T>::power((m[r] - m_new) * Exponent<T>::kUnit);
    l[r] = l[r] * rescale + (x == -kInfinity<R> ? R(0) : Exponent<T>::power((x - m_new) * Exponent<T>::kUnit));
    m[r] = m_new;
    return rescale;
  }

  // Sums o become results o / l, with the weight of `sink` in l where there is one; `kept` is the factor of dropout.
  // lse(i) is where the log-sum-exp of row i goes. A row without a visible key is 0 and -inf. Returns the rows from
  // row0 on in which some value is not finite, a bit each.
  template <class P, int kO, class Lse>
  TFORMER_DEVICE unsigned finish_rows(const Scores<T, kPlain>& scores, R (&o)[kLaneRows][kO], int row0, bool has_sink,
                                      R sink, R kept, Lse&& lse_at) {
    finish(scores);
    unsigned suspects = 0;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int i = row0 + P::row(r);
      R rescale = 1;
      if (has_sink && !dead(r)) rescale = add_sink(r, sink);
      const R by = dead(r) ? R(0) : kept * rescale / l[r];
      bool row_is_finite = true;
#pragma unroll
      for (int d = 0; d < kO; ++d) {
        o[r][d] *= by;
        row_is_finite = row_is_finite && is_finite(o[r][d]);
      }
      if (i < scores.Sq && lane() % 4 == 0) lse_at(i) = lse(r);
      const unsigned quads = ballot(!row_is_finite && i < scores.Sq);
      for (int g = 0; g < 8; ++g) suspects |= (quads >> 4 * g & 15 ? 1u : 0u) << (8 * r + g);
    }
    return suspects;
  }

  TFORMER_DEVICE bool dead(int r) const { return l[r] == 0; }
  TFORMER_DEVICE R lse(int r) const {
    return dead(r) ? -kInfinity<R> : m[r] + Exponent<T>::natural(Exponent<T>::of(l[r]));
  }
};

}  // namespace tformer::gpu
