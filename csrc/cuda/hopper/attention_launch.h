// The attention kernels for sm_90a as host files see them: plain C++, no torch, no CUDA header.
#pragma once

#include "../attention_launch.h"
#include "../gpu/tensor_map.h"
#include "../gpu/types.h"

namespace tformer {

// Why a forward call does not go to the kernels for sm_90a. tformer_ext/explain.py knows the numbers.
enum class HopperRefusal : int64_t {
  none = 0,
  dtype = 1,      // float32 and float64 are not for them
  device = 2,     // compute capability is not 9.0
  not_built = 3,  // TFORMER_CUDA_ARCHS has no 90
  operands = 4,   // more than scale, causal, window, key lengths, packed sequences and sinks
  split = 5,      // few queries and long keys: the keys are split
  layout = 6,     // not multiples of 16 bytes, an expanded dimension, no keys
  not_wanted = 7  // TFORMER_EXT_SM90 is not 1
};

// What a launch needs; the launch function fills the maps and the grid.
struct HopperForwardCall {
  gpu::TensorMap q, k, v;
  AttentionCall call;
};

namespace gpu {

// T: bf16 or f16, as the call's dtype. multiprocessors: of the device.
template <class T>
Status launch_hopper_forward(const AttentionCall& call, int multiprocessors, Stream stream);

}  // namespace gpu
}  // namespace tformer
