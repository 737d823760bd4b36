// Tiles of rows in shared memory that the copy engine fills and warpgroups multiply, and how they change hands.
#pragma once

#include <gpu/hopper.h>

namespace tformer::gpu {

// kRows rows of kWidth elements, in boxes of 64 columns as tensor_load leaves them.
template <int kRows_, int kWidth_>
struct BoxTile {
  static constexpr int kRows = kRows_, kWidth = kWidth_, kChunks = kWidth / 8;
  static constexpr int kBoxBytes = kRows * kBoxRowBytes, kBoxes = kWidth / kBoxColumns, kBytes = kBoxes * kBoxBytes;
  static_assert(kBoxBytes % 1024 == 0);
  char* data;

  TFORMER_DEVICE char* at(int row, int chunk) const {
    return data + chunk / 8 * kBoxBytes + row * kBoxRowBytes + ((chunk ^ row) & 7) * 16;
  }
  // By one thread. Rows from `row` on; where these end in the middle, rows of others or zeros follow.
  TFORMER_DEVICE void load(const TensorMap* map, int row, int head, int batch, Mbarrier* barrier) const {
    mbarrier_arrive_expect(barrier, kBytes);
#pragma unroll
    for (int n = 0; n < kBoxes; ++n) {
      tensor_load(data + n * kBoxBytes, map, n * kBoxColumns, row, head, batch, barrier);
    }
  }
  // 16 columns from column 16 d on, of rows from `row` on, a multiple of 8.
  static constexpr int column_bytes(int d) { return d / 4 * kBoxBytes + d % 4 * 32; }
  TFORMER_DEVICE uint64_t by_rows(int row) const { return matrix_descriptor(data + row * kBoxRowBytes, 16, 1024); }
  TFORMER_DEVICE uint64_t by_columns() const { return matrix_descriptor(data, kBoxBytes, 1024); }
};

// What tells of a buffer in shared memory that it is full, and that it is empty again.
struct Handover {
  Mbarrier full, empty;
};

// Buffer and phase of the n-th tile that goes through a ring of two; counted by fetching and multiplying warps alike.
constexpr int buffer_of(int n) { return n & 1; }
constexpr int phase_of(int n) { return n >> 1 & 1; }

}  // namespace tformer::gpu
