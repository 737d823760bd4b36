// Included by the file that compiles the kernels of a dtype for sm_90a.
#pragma once

#include "../attention_dispatch.h"
#include "attention_backward.h"
#include "attention_backward_dq.h"
#include "attention_backward_wide.h"
#include "attention_maps.h"

namespace tformer::gpu {

template <class Kernel, class QueryKernel>
Status launch_hopper_backward_kernels(const AttentionCall& given, const HopperSums& sums, Stream stream) {
  const AttentionParams& p = given.p;
  HopperBackwardCall call{};
  call.call = given, call.dropout = dropout_params(p.dropout_p, p.dropout_seed);
  call.dropout_scale = static_cast<float>(call.dropout.scale);
  call.sums = sums.sums, call.turns = sums.turns, call.ticket = sums.turns + hopper_slots(given);
  const int64_t batches = given.packed ? 1 : p.B;
  WorkGrid& grid = call.call.grid;
  grid = grid_of(given, Kernel::kKeys, p.Sk, p.Hk, p.Sq * p.Hq / p.Hk);
  if (grid.blocks() == 0) return kSuccess;
  Status status = map_of(call.q, p.q, p.D, p.Sq, p.Hq, batches, Kernel::kQueries);
  if (status == kSuccess) status = map_of(call.grad_o, p.grad_o, p.Dv, p.Sq, p.Hq, batches, Kernel::kQueries);
  if (status == kSuccess) status = map_of(call.k, p.k, p.D, p.Sk, p.Hk, batches, Kernel::kKeys);
  if (status == kSuccess) status = map_of(call.v, p.v, p.Dv, p.Sk, p.Hk, batches, Kernel::kKeys);
  if (status == kSuccess) status = launch<Kernel>({grid.blocks()}, Kernel::kSharedBytes, stream, call);
  if (status != kSuccess) return status;
  grid = grid_of(given, Kernel::kQueries, p.Sq, p.Hq, 0);
  return launch<QueryKernel>({grid.blocks()}, QueryKernel::kSharedBytes, stream, call);
}

template <class T, int kWidth, HopperExtra kExtra>
struct HopperBackwardOf {
  using type = HopperBackward<T, kWidth, kExtra>;
};
template <class T, HopperExtra kExtra>
struct HopperBackwardOf<T, 256, kExtra> {
  using type = HopperWideBackward<T, kExtra>;
};

template <class T>
Status launch_hopper_backward(const AttentionCall& call, const HopperSums& sums, Stream stream) {
  return for_width(call, [&](auto width) {
    return for_extra(call.p, [&](auto extra) {
      constexpr int kWidth = decltype(width)::value;
      constexpr HopperExtra kExtra = decltype(extra)::value;
      using Kernel = typename HopperBackwardOf<T, kWidth, kExtra>::type;
      using QueryKernel = QueryGradientsOfSums<T, kWidth, HopperDqSums<kWidth>, HopperBackwardCall>;
      return launch_hopper_backward_kernels<Kernel, QueryKernel>(call, sums, stream);
    });
  });
}

}  // namespace tformer::gpu
