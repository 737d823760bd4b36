// Which calls go to the kernels for sm_90a. For host files.
#pragma once

#include "../runtime.h"
#include "attention_launch.h"

namespace tformer {

// The copy engine walks along each dimension of a (B, H, S, width) tensor.
inline bool can_be_mapped(const Rows& t, int64_t B, int64_t H, int64_t S) {
  constexpr int64_t kMostStride = int64_t{1} << 38;  // of 16-bit elements: below 2^40 bytes
  const int64_t sizes[3] = {B, H, S};
  bool can = true;
  for (int d = 0; d < 3; ++d) can = can && (sizes[d] <= 1 || (t.stride[d] > 0 && t.stride[d] < kMostStride));
  return can;
}

// Whether kernels can read the bias of two neighbouring keys, of which the first is even, by one load of 4 bytes.
inline bool bias_in_pairs(const AttentionParams& p) {
  bool can = p.bias.dtype == p.dtype && p.bias.stride[3] == 1 && reinterpret_cast<uintptr_t>(p.bias.data) % 4 == 0;
  for (int d = 0; d < 3; ++d) can = can && p.bias.stride[d] % 2 == 0;
  return can;
}

// What both directions ask.
inline HopperRefusal hopper_refusal(const AttentionCall& call, const gpu::Device& device) {
  const AttentionParams& p = call.p;
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return HopperRefusal::dtype;
  if (device.major != 9 || device.minor != 0) return HopperRefusal::device;
#ifndef TFORMER_HOPPER
  return HopperRefusal::not_built;
#endif
  const bool biased = call.plain_but_bias && p.bias.data && p.dropout_p == 0 && bias_in_pairs(p);
  if (!call.plain && !biased) return HopperRefusal::operands;
  const int64_t batches = call.packed ? 1 : p.B;
  const bool mapped = can_be_mapped(p.q, batches, p.Hq, p.Sq) && can_be_mapped(p.k, batches, p.Hk, p.Sk) &&
                      can_be_mapped(p.v, batches, p.Hk, p.Sk);
  if (!call.aligned || !mapped || p.Sk == 0) return HopperRefusal::layout;
  return HopperRefusal::none;
}

inline HopperRefusal hopper_forward_refusal(const AttentionCall& call, const gpu::Device& device) {
  const HopperRefusal refusal = hopper_refusal(call, device);
  if (refusal != HopperRefusal::none && refusal != HopperRefusal::layout) return refusal;
  if (call.splits > 1) return HopperRefusal::split;
  if (refusal != HopperRefusal::none) return refusal;
  return gpu::hopper_is_wanted() ? HopperRefusal::none : HopperRefusal::not_wanted;
}

// A call without grad_o is asked about before there is one.
inline HopperRefusal hopper_backward_refusal(const AttentionCall& call, const gpu::Device& device) {
  const AttentionParams& p = call.p;
  const HopperRefusal refusal = hopper_refusal(call, device);
  if (refusal != HopperRefusal::none) return refusal;
  const bool mapped = !p.grad_o.data || can_be_mapped(p.grad_o, call.packed ? 1 : p.B, p.Hq, p.Sq);
  if (!mapped || p.Sq == 0) return HopperRefusal::layout;
  const bool shared = call.parts * call.shared_batches * call.shared_heads > 1 || !call.bias_has_rows;
  if (p.grad_bias && shared) return HopperRefusal::operands;  // an entry is then the sum of several pairs
  if (p.mask.data && p.mask.stride[1] != 0 && p.Hq > 1) return HopperRefusal::operands;
  return gpu::hopper_is_wanted() ? HopperRefusal::none : HopperRefusal::not_wanted;
}

}  // namespace tformer
