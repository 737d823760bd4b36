// The attention kernels for sm_90a as host files see them: plain C++, no torch, no CUDA header.
#pragma once

#include <type_traits>

#include "../attention_launch.h"
#include "../dropout_params.h"
#include "../gpu/tensor_map.h"
#include "../gpu/types.h"

namespace tformer {

// Why a call does not go to the kernels for sm_90a. tformer_ext/explain.py knows the numbers.
enum class HopperRefusal : int64_t {
  none = 0,
  dtype = 1,      // float32 and float64 are not for them
  device = 2,     // compute capability is not 9.0
  not_built = 3,  // TFORMER_CUDA_ARCHS has no 90
  operands = 4,   // more than scale, causal, window, key lengths, mask by keys (backward: of all heads), packed
                  // sequences, sinks and dropout; or, forward, a bias in pairs in its place; backward: that, with
                  // a gradient only where nothing shares its entries
  split = 5,      // few queries and long keys: the keys are split
  layout = 6,     // not multiples of 16 bytes, an expanded dimension, no keys; backward: no queries
  not_wanted = 7  // TFORMER_EXT_SM90 is 0
};

// What a launch needs; the launch function fills the maps and the grid.
struct HopperForwardCall {
  gpu::TensorMap q, k, v;
  AttentionCall call;
  DropoutParams dropout;
  int32_t* ticket;
};

// What a call has beside what all have; kernels are compiled for each.
enum class HopperExtra { none, dropout, bias };
constexpr HopperExtra hopper_extra(const AttentionParams& p) {
  return p.dropout_p > 0 ? HopperExtra::dropout : p.bias.data ? HopperExtra::bias : HopperExtra::none;
}

// f(what the call has, as a type).
template <class F>
auto for_extra(const AttentionParams& p, F&& f) {
  switch (hopper_extra(p)) {
    case HopperExtra::dropout:
      return f(std::integral_constant<HopperExtra, HopperExtra::dropout>{});
    case HopperExtra::bias:
      return f(std::integral_constant<HopperExtra, HopperExtra::bias>{});
    default:
      return f(std::integral_constant<HopperExtra, HopperExtra::none>{});
  }
}

// Rows of a forward tile of queries.
constexpr int hopper_forward_queries(int64_t width, HopperExtra extra) {
  return width <= 64 && extra == HopperExtra::none ? 192 : 128;
}

// Memory between the kernels of a backward call: sums of dq, a tile of queries in one slot or two, whose turn it is at
// each of these, and the ticket; words are 0 at first.
constexpr int hopper_backward_queries(int64_t width) { return width <= 64 ? 128 : 64; }
constexpr int hopper_slots_of_tile(int64_t width) { return width <= 128 ? 1 : 2; }
constexpr int64_t hopper_slots(const AttentionCall& call) {
  const int64_t width = call.p.D > call.p.Dv ? call.p.D : call.p.Dv;
  return (call.packed ? 1 : call.p.B) * call.p.Hq * query_tiles(call, hopper_backward_queries(width)) *
         hopper_slots_of_tile(width);
}
constexpr int64_t kHopperSlotFloats = 8192;
struct HopperSums {
  float* sums;     // (slots, kHopperSlotFloats)
  int32_t* turns;  // (slots + 1)
};

struct HopperBackwardCall {
  gpu::TensorMap q, k, v, grad_o;
  AttentionCall call;
  DropoutParams dropout;
  float dropout_scale;  // as float
  float* sums;
  int32_t *turns, *ticket;
};

namespace gpu {

// T: bf16 or f16, as the call's dtype. blocks: those that stay. ticket: a word that is 0 if tiles are taken one by one
// as blocks get free, or null.
template <class T>
Status launch_hopper_forward(const AttentionCall& call, int blocks, int32_t* ticket, Stream stream);
template <class T>
Status launch_hopper_backward(const AttentionCall& call, const HopperSums& sums, Stream stream);

}  // namespace gpu
}  // namespace tformer
