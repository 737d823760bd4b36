// Tiles of rows in shared memory.
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
// lies in different banks: eight rows on tensor cores; on CUDA cores, double alone, the rows 4 t of 16, too.
template <class T, int kRows_, int kWidth_>
struct SharedTile {
  static constexpr int kRows = kRows_, kWidth = kWidth_;
  static constexpr int kChunk = Chunk<T>::kSize, kChunks = kWidth / kChunk;
  static constexpr int kBytes = kRows * kWidth * static_cast<int>(sizeof(T));
  static_assert(kChunks >= 8 && kRows % 8 == 0);
  char* data;

  TFORMER_DEVICE char* at(int row, int chunk) const {
    const int swapped = (sizeof(T) == 8 ? row ^ row >> 3 : row) & 7;
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

}  // namespace tformer::gpu
