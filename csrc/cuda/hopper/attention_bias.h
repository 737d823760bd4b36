// How the kernels for sm_90a read a bias: see bias_in_pairs.
#pragma once

#include <gpu/hopper.h>

#include "../attention_scores.h"

namespace tformer::gpu {

// What belongs to a tile of scores, as products spread these over lanes: the elements of two neighbouring keys at once.
template <class T, int kKeys>
struct BiasTile {
  using P = TensorCores<T, 2>;
  uint32_t pairs[2][kKeys / 8];

  // Of queries from row0 on and keys from key0 on. What lies past the last ones meets nothing: the last in its place.
  TFORMER_DEVICE void read(const AttentionParams& p, int b, int h, int row0, int key0) {
    const auto* bias = static_cast<const uint16_t*>(p.bias.data) + b * p.bias.stride[0] + h * p.bias.stride[1];
    const int last_row = static_cast<int>(p.Sq) - 1, last_key = static_cast<int>(p.Sk) - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint16_t* row = bias + smaller(row0 + P::row(r), last_row) * p.bias.stride[2];
      if (key0 + kKeys - 1 <= last_key) {
        const uint16_t* from = row + key0 + P::first_column();
#pragma unroll
        for (int k = 0; k < kKeys / 8; ++k) pairs[r][k] = *reinterpret_cast<const uint32_t*>(from + 8 * k);
      } else {
#pragma unroll
        for (int k = 0; k < kKeys / 8; ++k) {
          const int j = key0 + P::column(2 * k);
          pairs[r][k] = row[smaller(j, last_key)] | uint32_t{row[smaller(j + 1, last_key)]} << 16;
        }
      }
    }
  }

  // Products become scores.
  TFORMER_DEVICE void add_to(float (&s)[2][kKeys / 4], float scale) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int k = 0; k < kKeys / 8; ++k) {
        float low, high;
        unpack_two<T>(pairs[r][k], low, high);
        s[r][2 * k] = fma(s[r][2 * k], scale, low), s[r][2 * k + 1] = fma(s[r][2 * k + 1], scale, high);
      }
    }
  }
};

// As BiasTile, of transposed scores: keys by queries, so elements come one by one.
template <class T, int kQueries>
struct TransposedBias {
  using P = TensorCores<T, 2>;
  T x[2][kQueries / 4];

  TFORMER_DEVICE void read(const AttentionParams& p, int b, int h, int i0, int row0) {
    const int lane_i0 = i0 + P::first_column(), j = row0 + P::row(0), offset = P::row(1) - P::row(0);
    const int64_t stride = p.bias.stride[2];
    const T* row = static_cast<const T*>(p.bias.data) + b * p.bias.stride[0] + h * p.bias.stride[1] + j;
    row += lane_i0 * stride;
    const int rows = static_cast<int>(p.Sq) - lane_i0;
    const bool first = j < p.Sk, second = j + offset < p.Sk;
#pragma unroll
    for (int c = 0; c < kQueries / 4; ++c) {  // step by step: registers are short
      const bool there = P::column_offset(c) < rows;
      x[0][c] = there && first ? row[0] : T{}, x[1][c] = there && second ? row[offset] : T{};
      row += c % 2 == 0 ? stride : 7 * stride;
    }
  }

  // Products become scores, in columns from `first` on.
  template <int kC>
  TFORMER_DEVICE void add_to(float (&s)[2][kC], int first, float scale) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kQueries / 4; ++c) s[r][first + c] = fma(s[r][first + c], scale, widen(x[r][c]));
    }
  }
};

// Where registers are short: kAtOnce queries after another are read and added.
template <class T, int kAtOnce, int kC>
TFORMER_DEVICE void add_transposed_bias(float (&s)[2][kC], const AttentionParams& p, int b, int h, int i0, int row0) {
#pragma unroll
  for (int first = 0; first < kC; first += kAtOnce / 4) {
    TransposedBias<T, kAtOnce> bias;
    bias.read(p, b, h, i0 + 4 * first, row0);
    bias.add_to(s, first, static_cast<float>(p.scale));
    hold(s);
  }
}

}  // namespace tformer::gpu
