// Products of tiles, by a warp: on tensor cores for 16-bit elements and, from slices, for float, on CUDA cores for
// double. All spread a matrix over the lanes alike: a lane holds the rows 8 r + lane / 4 of its warp's, and a quarter
// of their columns. What is written in those terms is written once.
#pragma once

#include "attention_tiles.h"

namespace tformer::gpu {

// A lane holds kLaneRows rows, and of a matrix with n columns n / 4 of them.
template <class T, int kLaneRows>
struct CudaCores {
  using R = Real<T>;
  static constexpr int kChunk = Chunk<T>::kSize;
  static constexpr int kColumns = 16;  // the smallest matrix

  static TFORMER_DEVICE int row(int r) { return 8 * r + lane() / 4; }
  // column(c) is the first one and a constant: what is compared with it can take the first one's side.
  static TFORMER_DEVICE int first_column() { return lane() % 4 * 4; }
  static constexpr int column_offset(int c) { return c / 4 * 16 + c % 4; }
  static TFORMER_DEVICE int column(int c) { return first_column() + column_offset(c); }

  // s[i][j] += sum over d of a[a_row + i][d] b[j][d]
  template <int kC, class A, class B>
  static TFORMER_DEVICE void multiply_rows(R (&s)[kLaneRows][kC], const A& a, int a_row, const B& b) {
#pragma unroll 1
    for (int d = 0; d < A::kChunks; ++d) {
      Chunk<T> x[kLaneRows];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) x[r] = a.chunk(a_row + row(r), d);
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const Chunk<T> y = b.chunk(column(c), d);
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
          for (int e = 0; e < kChunk; ++e) s[r][c] = fma(x[r].x[e], y.x[e], s[r][c]);
        }
      }
    }
  }

  // o[i][d] += sum over j of w[i][j] b[j][d]
  template <int kC, int kO, class B>
  static TFORMER_DEVICE void multiply_down(R (&o)[kLaneRows][kO], const R (&w)[kLaneRows][kC], const B& b) {
    static_assert(4 * kO == B::kWidth && 4 * kC == B::kRows);
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        R x[kLaneRows];
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) x[r] = shuffle_index(w[r][c], lane() / 4 * 4 + t);
#pragma unroll
        for (int d = 0; d < kO; d += kChunk) {
          const Chunk<T> y = b.chunk(c / 4 * 16 + t * 4 + c % 4, column(d) / kChunk);
#pragma unroll
          for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
            for (int e = 0; e < kChunk; ++e) o[r][d + e] = fma(x[r], y.x[e], o[r][d + e]);
          }
        }
      }
    }
  }

  // Rows of o into the tile from `first` on, where no other warp reads.
  template <int kO, class Tile>
  static TFORMER_DEVICE void put(const R (&o)[kLaneRows][kO], const Tile& tile, int first) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
      for (int d = 0; d < kO; d += kChunk) {
        Chunk<T> chunk;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) chunk.x[e] = o[r][d + e];
        *reinterpret_cast<Chunk<T>*>(tile.at(first + row(r), column(d) / kChunk)) = chunk;
      }
    }
  }
};

// Where the sums of mma.sync lie: kLaneRows = 2 is one row of fragments, 4 two, which share what they are multiplied
// with.
template <int kLaneRows>
struct FragmentLayout {
  static_assert(kLaneRows % 2 == 0);
  static constexpr int kColumns = 16;
  static constexpr int kFragments = kLaneRows / 2;

  static TFORMER_DEVICE int row(int r) { return 8 * r + lane() / 4; }
  static TFORMER_DEVICE int first_column() { return lane() % 4 * 2; }
  static constexpr int column_offset(int c) { return c / 2 * 8 + c % 2; }
  static TFORMER_DEVICE int column(int c) { return first_column() + column_offset(c); }
};

template <class T, int kLaneRows>
struct TensorCores : FragmentLayout<kLaneRows> {
  using Layout = FragmentLayout<kLaneRows>;
  static constexpr int kFragments = Layout::kFragments;

  template <int kC>
  static TFORMER_DEVICE void multiply(float (&s)[kLaneRows][kC], int m, int n, const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    float c[4] = {s[2 * m][2 * n], s[2 * m][2 * n + 1], s[2 * m + 1][2 * n], s[2 * m + 1][2 * n + 1]};
    mma_16x8x16<T>(c, a, b);
    s[2 * m][2 * n] = c[0], s[2 * m][2 * n + 1] = c[1];
    s[2 * m + 1][2 * n] = c[2], s[2 * m + 1][2 * n + 1] = c[3];
  }

  template <int kC, class A, class B>
  static TFORMER_DEVICE void multiply_rows(float (&s)[kLaneRows][kC], const A& a, int a_row, const B& b) {
    const int l = lane();  // the same addresses in a tile for all three operands: they stay in registers
#pragma unroll
    for (int d = 0; d < A::kWidth / 16; ++d) {
      uint32_t x[kFragments][4];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) load_matrix_x4(x[m], a.at(a_row + 16 * m + l % 16, 2 * d, l / 16));
#pragma unroll
      for (int n = 0; n < kC / 4; ++n) {
        uint32_t y[4];
        load_matrix_x4(y, b.at(16 * n + l % 16, 2 * d, l / 16));
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          multiply(s, m, 2 * n, x[m], y[0], y[2]);
          multiply(s, m, 2 * n + 1, x[m], y[1], y[3]);
        }
      }
    }
  }

  // Sums become operands where they are: columns 2 t, 2 t + 1 of two neighbouring 8 x 8 blocks are what a lane of the
  // left operand holds.
  template <int kC, int kO, class B>
  static TFORMER_DEVICE void multiply_down(float (&o)[kLaneRows][kO], const float (&w)[kLaneRows][kC], const B& b) {
    static_assert(4 * kO == B::kWidth && 4 * kC == B::kRows);
    const int l = lane();
#pragma unroll
    for (int j = 0; j < kC / 4; ++j) {
      uint32_t x[kFragments][4];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = &w[2 * m + e % 2][4 * j + e / 2 * 2];
          x[m][e] = pack_two<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < kO / 4; ++d) {
        uint32_t y[4];
        load_matrix_x4_transposed(y, b.at(16 * j + l % 16, 2 * d, l / 16));
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          multiply(o, m, 2 * d, x[m], y[0], y[1]);
          multiply(o, m, 2 * d + 1, x[m], y[2], y[3]);
        }
      }
    }
  }

  // o[i][d] += sum over j of a[a_row + i][j] b[j][8 b_chunk + d]. kAcross: of a[j][a_row + i].
  template <bool kAcross, int kO, class A, class B>
  static TFORMER_DEVICE void multiply_tiles(float (&o)[kLaneRows][kO], const A& a, int a_row, const B& b, int b_chunk) {
    static_assert((kAcross ? A::kRows : A::kWidth) == B::kRows);
    const int l = lane();
#pragma unroll
    for (int j = 0; j < B::kRows / 16; ++j) {
      uint32_t x[kFragments][4];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        if constexpr (kAcross) {
          load_matrix_x4_transposed(x[m], a.at(16 * j + l % 8 + l / 16 * 8, a_row / 8 + 2 * m, l / 8 % 2));
        } else {
          load_matrix_x4(x[m], a.at(a_row + 16 * m + l % 16, 2 * j, l / 16));
        }
      }
#pragma unroll
      for (int d = 0; d < kO / 4; ++d) {
        uint32_t y[4];
        load_matrix_x4_transposed(y, b.at(16 * j + l % 16, b_chunk + 2 * d, l / 16));
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          multiply(o, m, 2 * d, x[m], y[0], y[1]);
          multiply(o, m, 2 * d + 1, x[m], y[2], y[3]);
        }
      }
    }
  }

  // From chunk `first_chunk` of each row on.
  template <int kO, class Tile>
  static TFORMER_DEVICE void put(const float (&o)[kLaneRows][kO], const Tile& tile, int first, int first_chunk = 0) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
      for (int d = 0; d < kO; d += 2) {
        char* chunk = tile.at(first + Layout::row(r), first_chunk + d / 2);
        *reinterpret_cast<uint32_t*>(chunk + lane() % 4 * 4) = pack_two<T>(o[r][d], o[r][d + 1]);
      }
    }
  }
};

// A register of 32-bit elements each of a fragment, cut into two slices of 11 bits. What both leave of a float is below
// 2^-23 of it: mma_16x8x8_tf32 does not read what lies under the bits of `low`. An infinity becomes one and a NaN.
template <int kCount>
struct SlicedFragment {
  uint32_t high[kCount], low[kCount];

  TFORMER_DEVICE void set(int n, float x) {
    high[n] = (bits_of(x) + 0x1000) & ~0x1fffu;  // to_tf32 without its question for infinity
    low[n] = bits_of(x - float_of_bits(high[n]));
  }
};

// Products of floats from slices (Ootomo & Yokota 2022, "Recovering single precision accuracy from Tensor Cores while
// surpassing the FP32 theoretical peak performance"): three of four, the product of what is low is below what sums
// keep. Tensor cores cut sums off where float rounds them, so the errors of a long sum have one sign. Hence a few
// products make a sum of their own, the small ones first, and that is added with rounding.
template <int kLaneRows>
struct TensorCores<float, kLaneRows> : FragmentLayout<kLaneRows> {
  using Layout = FragmentLayout<kLaneRows>;
  static constexpr int kFragments = Layout::kFragments;

  // The sums of fragment m and of the 8 columns n += the kSteps products of a and b.
  template <int kC, int kSteps>
  static TFORMER_DEVICE void add_products(float (&s)[kLaneRows][kC], int m, int n, const SlicedFragment<4> (&a)[kSteps],
                                          const SlicedFragment<2> (&b)[kSteps]) {
    float part[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) mma_16x8x8_tf32(part, a[k].low, b[k].high);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) mma_16x8x8_tf32(part, a[k].high, b[k].low);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) mma_16x8x8_tf32(part, a[k].high, b[k].high);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[2 * m + e / 2][2 * n + e % 2] += part[e];
  }

  // s is 0 at first. A slice of a number near the largest one is infinite, those of infinity make NaN: what is not
  // finite is multiplied again as it is.
  template <int kC, class A, class B>
  static TFORMER_DEVICE void multiply_rows(float (&s)[kLaneRows][kC], const A& a, int a_row, const B& b) {
    multiply_sliced_rows(s, a, a_row, b);
    float sum = 0;  // of zeros, or NaN
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
      for (int c = 0; c < kC; ++c) sum = fma(s[r][c], 0.0f, sum);
    }
    if (!any(sum != 0)) return;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        s[r][c] = 0;
#pragma unroll 1
        for (int d = 0; d < A::kChunks; ++d) {
          const Chunk<float> x = a.chunk(a_row + Layout::row(r), d), y = b.chunk(Layout::column(c), d);
#pragma unroll
          for (int e = 0; e < 4; ++e) s[r][c] = fma(x.x[e], y.x[e], s[r][c]);
        }
      }
    }
  }

  template <int kC, class A, class B>
  static TFORMER_DEVICE void multiply_sliced_rows(float (&s)[kLaneRows][kC], const A& a, int a_row, const B& b) {
    constexpr int kSteps = 2;
    const int l = lane();
#pragma unroll
    for (int d = 0; d < A::kWidth / 8; d += kSteps) {
      SlicedFragment<4> x[kFragments][kSteps];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          uint32_t read[4];
          load_matrix_x4(read, a.at(a_row + 16 * m + l % 16, 2 * (d + k), l / 16));
#pragma unroll
          for (int e = 0; e < 4; ++e) x[m][k].set(e, float_of_bits(read[e]));
        }
      }
#pragma unroll
      for (int n = 0; n < kC / 4; ++n) {
        SlicedFragment<2> y[2][kSteps];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          uint32_t read[4];
          load_matrix_x4(read, b.at(16 * n + l % 16, 2 * (d + k), l / 16));
#pragma unroll
          for (int e = 0; e < 4; ++e) y[e % 2][k].set(e / 2, float_of_bits(read[e]));
        }
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          add_products(s, m, 2 * n, x[m], y[0]);
          add_products(s, m, 2 * n + 1, x[m], y[1]);
        }
      }
    }
  }

  // Sums become operands where they are: the columns 2 t and 2 t + 1 of 8 are taken as t and t + 4, on both sides.
  template <int kC, int kO, class B>
  static TFORMER_DEVICE void multiply_down(float (&o)[kLaneRows][kO], const float (&w)[kLaneRows][kC], const B& b) {
    static_assert(4 * kO == B::kWidth && 4 * kC == B::kRows);
    constexpr int kSteps = kC / 2;
    const int g = lane() / 4, t = lane() % 4;
    SlicedFragment<4> x[kFragments][kSteps];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][k].set(e, w[2 * m + e % 2][2 * k + e / 2]);
      }
    }
#pragma unroll
    for (int d = 0; d < kO / 2; ++d) {
      SlicedFragment<2> y[kSteps];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          y[k].set(e, *reinterpret_cast<const float*>(b.at(8 * k + 2 * t + e, 2 * d, g / 4) + g % 4 * 4));
        }
      }
#pragma unroll
      for (int m = 0; m < kFragments; ++m) add_products(o, m, d, x[m], y);
    }
  }

  template <int kO, class Tile>
  static TFORMER_DEVICE void put(const float (&o)[kLaneRows][kO], const Tile& tile, int first) {
    struct alignas(8) Pair {
      float x[2];
    };
    const int t = lane() % 4;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
      for (int d = 0; d < kO; d += 2) {
        char* chunk = tile.at(first + Layout::row(r), d, t / 2);
        *reinterpret_cast<Pair*>(chunk + t % 2 * 8) = {{o[r][d], o[r][d + 1]}};
      }
    }
  }
};

template <class T, int kLaneRows>
struct ProductsOf {
  using type = TensorCores<T, kLaneRows>;
};
template <int kLaneRows>
struct ProductsOf<double, kLaneRows> {
  using type = CudaCores<double, kLaneRows>;
};
template <class T, int kLaneRows>
using Products = typename ProductsOf<T, kLaneRows>::type;

// Rows of a warp are a multiple of this.
template <class T>
constexpr int kRowUnit = sizeof(T) == 8 ? 8 : 16;

template <class R, int kRows, int kColumns>
TFORMER_DEVICE void clear(R (&x)[kRows][kColumns]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[r][c] = 0;
  }
}

template <class R, int kRows, int kColumns>
TFORMER_DEVICE void multiply_all(R (&x)[kRows][kColumns], R by) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[r][c] *= by;
  }
}

template <class R, int kRows, int kColumns>
TFORMER_DEVICE void multiply_rows_by(R (&x)[kRows][kColumns], const R (&by)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[r][c] *= by[r];
  }
}

// Over the four lanes that share rows.
template <class R>
TFORMER_DEVICE R quad_sum(R x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
template <class R>
TFORMER_DEVICE R quad_maximum(R x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}

}  // namespace tformer::gpu
