// Attention kernels as host files see them: plain C++, no torch, no CUDA header.
#pragma once

#include "../params.h"
#include "attention_grid.h"
#include "gpu/launch.h"

namespace tformer {

// What a launch needs beside AttentionParams.
struct AttentionCall {
  AttentionParams p;
  gpu::WorkGrid grid;   // the launch functions fill it
  bool packed;          // sequences lie one after the other, p.cu_seqlens_* tell where
  bool aligned;         // rows of all tensors begin at multiples of 16 bytes
  bool plain;           // no operand but the scale (positive), what key_range.h knows and a mask by keys; dropout aside
  bool plain_but_bias;  // plain, if it had no bias

  // Forward. Split keys: each split has a part of the keys, and its own o and lse. Null where there is one split.
  int64_t splits, split_keys;
  void* split_o;            // (splits, B, Hq, Sq, Dv) float (double for f64)
  void* split_lse;          // (splits, B, Hq, Sq) likewise
  int64_t split_stride[3];  // rows: split, batch, head

  // Backward. What batches or heads share of a bias's gradient is added up pair by pair of (batch, head), in order, in
  // `parts` sums of `pairs` pairs each.
  bool bias_has_rows;                    // a query dimension
  int64_t shared_batches, shared_heads;  // of one entry of that gradient; 1: not shared
  int64_t parts, pairs;
  int64_t part_stride;  // elements of grad_bias
  double* grad_sinks;   // (Hq)
};

// out[i] = sum over r of in[i, r], in a fixed order.
struct SumCall {
  const void* in;
  void* out;  // contiguous
  bool is_double;
  int64_t size[4], stride[4];                  // of out, and of in where its index moves
  int64_t reduced_size[5], reduced_stride[5];  // 1 and 0 where there is nothing to sum
};

// Head dimensions up to this.
constexpr int64_t kMostHeadDim = 256;
// Lengths up to this: positions are int in kernels.
constexpr int64_t kMostPositions = int64_t{1} << 29;

gpu::Status launch_attention_forward(const AttentionCall& call, gpu::Stream stream);
gpu::Status launch_attention_merge(const AttentionCall& call, gpu::Stream stream);
gpu::Status launch_attention_delta(const AttentionCall& call, gpu::Stream stream);
gpu::Status launch_attention_sinks(const AttentionCall& call, gpu::Stream stream);
gpu::Status launch_attention_dkv(const AttentionCall& call, gpu::Stream stream);
gpu::Status launch_attention_dq(const AttentionCall& call, gpu::Stream stream);
gpu::Status launch_sum(const SumCall& call, gpu::Stream stream);

}  // namespace tformer
