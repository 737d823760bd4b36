// Tiles of rows in shared memory, and products of tiles: on tensor cores for bf16 and f16, on CUDA cores for float and
// double. Both spread a matrix over the lanes of a warp alike: a lane holds the rows 8 r + lane / 4 of its warp's, and
// a quarter of their columns. What is written in those terms is written once.
#pragma once

#include <gpu/device.h>

#include "../params.h"

namespace tformer::gpu {

template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

TFORMER_DEVICE float widen(float x) { return x; }
TFORMER_DEVICE double widen(double x) { return x; }
TFORMER_DEVICE float widen(bf16 x) { return to_float(x); }
TFORMER_DEVICE float widen(f16 x) { return to_float(x); }

template <class T>
TFORMER_DEVICE T narrow(Real<T> x) {
  if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <class To>
TFORMER_DEVICE To* row_at(const Rows& r, int64_t b, int64_t h, int64_t i) {
  return static_cast<To*>(r.data) + b * r.stride[0] + h * r.stride[1] + i * r.stride[2];
}

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// What one 16-byte access moves.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// Rows [first, first + count) of a tile in shared memory, which this warp has written, to global memory.
template <class Tile, class T>
TFORMER_DEVICE void store_rows(const Tile& tile, int first, int count, T* to, int64_t stride, int rows, int width,
                               bool aligned) {
  constexpr int kChunk = Chunk<T>::kSize;
  sync_warp();
  for (int n = lane(); n < count * Tile::kChunks; n += kWarp) {
    const int row = n / Tile::kChunks, c = n % Tile::kChunks, column = c * kChunk;
    if (row >= rows || column >= width) continue;
    T* target = to + row * stride + column;
    const Chunk<T> from = *reinterpret_cast<const Chunk<T>*>(tile.at(first + row, c));
    if (aligned && column + kChunk <= width) {
      *reinterpret_cast<Chunk<T>*>(target) = from;
    } else {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (column + e < width) target[e] = from.x[e];
      }
    }
  }
  sync_warp();
}

// kRows rows of kWidth elements. Chunks of a row are permuted by the row's number, so that what a warp reads at a time
// lies in different banks: eight rows on tensor cores; on CUDA cores the rows 4 t of 16, too.
template <class T, int kRows_, int kWidth_>
struct SharedTile {
  static constexpr int kRows = kRows_, kWidth = kWidth_;
  static constexpr int kChunk = Chunk<T>::kSize, kChunks = kWidth / kChunk;
  static constexpr int kBytes = kRows * kWidth * static_cast<int>(sizeof(T));
  static_assert(kChunks >= 8 && kRows % 8 == 0);
  char* data;

  TFORMER_DEVICE char* at(int row, int chunk) const {
    const int swapped = (sizeof(T) == 2 ? row : row ^ row >> 3) & 7;
    return data + (row * kChunks + (chunk ^ swapped)) * 16;
  }
  // Chunk `even` + `odd`, the former known to the compiler, the latter 0 or 1: few different addresses to keep.
  TFORMER_DEVICE char* at(int row, int even, int odd) const {
    const int first = row * kChunks * 16 + (odd ^ (row & 7)) * 16;
    return data + (even & ~7) * 16 + (first ^ (even & 7) * 16);
  }
  TFORMER_DEVICE Chunk<T> chunk(int row, int c) const { return *reinterpret_cast<const Chunk<T>*>(at(row, c)); }

  // Rows from global memory in the background, by `threads` threads; zeros beyond `rows` and `width`. `aligned`: every
  // row begins at a multiple of 16 bytes; else, and for what is not there, plain stores.
  template <int kThreads>
  TFORMER_DEVICE void load(const T* from, int64_t stride, int rows, int width, bool aligned) const {
    static_assert(kThreads % kChunks == 0 || kChunks % kThreads == 0);
    constexpr int kStep = kThreads > kChunks ? kThreads / kChunks : 1;
    static_assert(kRows % kStep == 0);
    // a thread keeps to its column of chunks; it has several where a row is longer than there are threads
    for (int c = thread_index() % kChunks; c < kChunks; c += kThreads) {
      const int first = c * kChunk, left = larger(smaller(width - first, kChunk), 0);
      int row = thread_index() / kChunks;
      const T* source = from + (row * stride + first);
#pragma unroll 2
      for (int n = 0; n < kRows / kStep; ++n, row += kStep, source += kStep * stride) {
        load_chunk(at(row, c), source, row < rows ? left : 0, aligned);
      }
    }
  }

  TFORMER_DEVICE void store(int first, int count, T* to, int64_t stride, int rows, int width, bool aligned) const {
    store_rows(*this, first, count, to, stride, rows, width, aligned);
  }

 private:
  static TFORMER_DEVICE void load_chunk(char* to, const T* source, int left, bool aligned) {
    if (left == 0) {
      store_16(to, Bits16Bytes{});
    } else if (aligned) {
      copy_async_16(to, source, left * static_cast<int>(sizeof(T)));
    } else {
      Chunk<T> chunk{};
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (e < left) chunk.x[e] = source[e];
      }
      *reinterpret_cast<Chunk<T>*>(to) = chunk;
    }
  }
};

// Products of a warp. A lane holds kLaneRows rows, and of a matrix with n columns n / 4 of them.
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

  // o[i][d] += sum over j of w[i][j] b[j][d]. In float the sum of a tile is added as a whole: one running total over
  // all tiles would round more.
  template <int kC, int kO, class B>
  static TFORMER_DEVICE void multiply_down(R (&o)[kLaneRows][kO], const R (&w)[kLaneRows][kC], const B& b) {
    if constexpr (sizeof(R) == 4) {
      R part[kLaneRows][kO] = {};
      add_down(part, w, b);
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
        for (int d = 0; d < kO; ++d) o[r][d] += part[r][d];
      }
    } else {
      add_down(o, w, b);
    }
  }

  template <int kC, int kO, class B>
  static TFORMER_DEVICE void add_down(R (&o)[kLaneRows][kO], const R (&w)[kLaneRows][kC], const B& b) {
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

// mma.sync: kLaneRows = 2 is one row of fragments, 4 two, which share what they are multiplied with.
template <class T, int kLaneRows>
struct TensorCores {
  static constexpr int kColumns = 16;
  static constexpr int kFragments = kLaneRows / 2;

  static TFORMER_DEVICE int row(int r) { return 8 * r + lane() / 4; }
  static TFORMER_DEVICE int first_column() { return lane() % 4 * 2; }
  static constexpr int column_offset(int c) { return c / 2 * 8 + c % 2; }
  static TFORMER_DEVICE int column(int c) { return first_column() + column_offset(c); }

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

  template <int kO, class Tile>
  static TFORMER_DEVICE void put(const float (&o)[kLaneRows][kO], const Tile& tile, int first) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
      for (int d = 0; d < kO; d += 2) {
        char* chunk = tile.at(first + row(r), d / 2);
        *reinterpret_cast<uint32_t*>(chunk + lane() % 4 * 4) = pack_two<T>(o[r][d], o[r][d + 1]);
      }
    }
  }
};

template <class T, int kLaneRows>
struct ProductsOf {
  using type = CudaCores<T, kLaneRows>;
};
template <int kLaneRows>
struct ProductsOf<bf16, kLaneRows> {
  using type = TensorCores<bf16, kLaneRows>;
};
template <int kLaneRows>
struct ProductsOf<f16, kLaneRows> {
  using type = TensorCores<f16, kLaneRows>;
};
template <class T, int kLaneRows>
using Products = typename ProductsOf<T, kLaneRows>::type;

template <class R, int kRows, int kColumns>
TFORMER_DEVICE void clear(R (&x)[kRows][kColumns]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[r][c] = 0;
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
