// Tensors as the copy engine of sm_90 sees them; also for host files: no CUDA header here.
#pragma once

#include <cstdint>

#include "launch.h"

namespace tformer::gpu {

// A CUtensorMap. Kernels get it inside their parameters and never look into it.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// Rows of 128 bytes, 64 elements of 16 bits: what a copy moves is a box of some rows of one head of one batch.
constexpr int kBoxColumns = 64, kBoxRowBytes = 128;

// Describes a tensor of 16-bit elements. sizes: columns, positions, heads, batches; strides: elements between
// positions, heads, batches. Boxes have `rows` positions, up to 256, and lie in shared memory with the 128-byte
// swizzle: chunk c of 16 bytes of row r is at chunk c ^ r % 8. What a box has beyond the sizes becomes 0.
// data and strides are multiples of 16 bytes; a stride is above 0 and below 2^40 bytes.
Status encode_tensor_map(TensorMap& map, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                         int rows);

}  // namespace tformer::gpu
