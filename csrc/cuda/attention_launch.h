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

// Tiles of so many queries of a head; of all sequences where they are packed.
constexpr int64_t query_tiles(const AttentionCall& call, int rows) {
  return call.packed ? call.p.Sq / rows + call.p.B : (call.p.Sq + rows - 1) / rows;
}

// Memory between the kernels of a backward call in one pass: sums of dq, by tiles of queries; whose turn it is at each;
// the ticket by which blocks take their work. Words are 0 at first.
constexpr int kOnePassQueries = 64;
struct OnePassCall {
  AttentionCall call;
  float* sums;  // (tiles of queries of all batches and heads, kOnePassQueries, compiled width)
  int32_t *turns, *ticket;
};
constexpr int64_t one_pass_tiles(const AttentionCall& call) {
  return (call.packed ? 1 : call.p.B) * call.p.Hq * query_tiles(call, kOnePassQueries);
}
constexpr int64_t one_pass_width(const AttentionCall& call) {
  const int64_t width = call.p.D > call.p.Dv ? call.p.D : call.p.Dv;
  return width <= 64 ? 64 : width <= 128 ? 128 : 256;
}
// 16-bit elements have kernels of their own for these.
constexpr bool is_plain(const AttentionCall& call) { return call.plain && call.p.dropout_p == 0 && call.aligned; }

// Which calls it takes: 16-bit elements; no gradient of a bias, or one whose entries belong to one pair each. Above
// width 128, and above 64 what is not plain, a block needs so much shared memory.
constexpr size_t kOnePassBytes = size_t{148} << 10;
constexpr bool goes_in_one_pass(const AttentionCall& call, size_t shared_bytes) {
  const AttentionParams& p = call.p;
  const bool sums_bias = p.grad_bias && (!call.bias_has_rows || p.grad_bias_stride[3] == 0 ||
                                         call.parts * call.shared_batches * call.shared_heads > 1);
  const int64_t width = one_pass_width(call);
  const bool fits = width == 64 || (width == 128 && is_plain(call)) || shared_bytes >= kOnePassBytes;
  return (p.dtype == DType::bf16 || p.dtype == DType::f16) && fits && !sums_bias;
}

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
// All three gradients. shared_bytes: that a block may have, which decides the size of tiles and so the order of sums.
gpu::Status launch_attention_one_pass(const OnePassCall& call, size_t shared_bytes, gpu::Stream stream);
gpu::Status launch_attention_dkv(const AttentionCall& call, gpu::Stream stream);
gpu::Status launch_attention_dq(const AttentionCall& call, gpu::Stream stream);
gpu::Status launch_sum(const SumCall& call, gpu::Stream stream);

}  // namespace tformer
