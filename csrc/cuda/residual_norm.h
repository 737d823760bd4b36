// The launches of the residual norms, for their host file.
#pragma once

#include "../params.h"
#include "dropout_params.h"
#include "gpu/launch.h"

namespace tformer {

// A parameter of N elements, in its own dtype: converting it first would be a launch of its own.
struct NormVector {
  const void* data;  // null where there is none
  DType dtype;       // that of x, or float (double for double)
};

struct NormDevice {
  int multiprocessors;
  size_t shared_bytes;  // of a block at most
};

// A call as the kernels see it; p.weight and p.bias are not used.
struct NormCall {
  NormParams p;
  NormVector weight, bias;
  DropoutParams dropout;

  // Set by the launch.
  int group;        // threads that share a row: a power of two
  bool keeps_rows;  // between them they hold all of it
  bool whole;       // rows begin at multiples of 16 bytes, as do all vectors, and are whole pieces of 16 bytes
  int64_t blocks;   // backward, each has a row of partials
  int stages;       // backward: rows in shared memory, 2 where the next one is fetched ahead
};

gpu::Status launch_norm_forward(NormCall call, const NormDevice& device, gpu::Stream stream);

// Rows that partial_weight and partial_bias of launch_norm_backward must have.
int64_t most_norm_partials(const NormDevice& device);

// out[n] (N) of dtype[n] = partial[n] (blocks, N), of float or double if `wide`, summed over the blocks in order.
// n = 0: the gradient of weight, 1: of bias; null where it is not wanted. The launch sets all but out and dtype.
struct NormSums {
  void* out[2];
  DType dtype[2];
  const void* partial[2];
  int64_t blocks, N;
  bool wide;
};

gpu::Status launch_norm_backward(NormCall call, const NormDevice& device, NormSums sums, gpu::Stream stream);

}  // namespace tformer
