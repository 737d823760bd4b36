// Included by the file that compiles the kernels of a dtype for sm_90a.
#pragma once

#include <algorithm>

#include "../attention_dispatch.h"
#include "attention_forward.h"
#include "attention_maps.h"

namespace tformer::gpu {

template <class Kernel>
Status launch_hopper_forward_kernel(const AttentionCall& given, int blocks, int32_t* ticket, Stream stream) {
  const AttentionParams& p = given.p;
  HopperForwardCall call{};
  call.call = given, call.dropout = dropout_params(p.dropout_p, p.dropout_seed), call.ticket = ticket;
  const int64_t batches = given.packed ? 1 : p.B;
  WorkGrid& grid = call.call.grid;
  grid = grid_of(given, Kernel::kRows, p.Sq, p.Hq, p.Sk * p.Hk / p.Hq);
  grid.last_tile_first = p.causal != kNotCausal;
  if (grid.blocks() == 0) return kSuccess;
  Status status = map_of(call.q, p.q, p.D, p.Sq, p.Hq, batches, Kernel::kRows);
  if (status == kSuccess) status = map_of(call.k, p.k, p.D, p.Sk, p.Hk, batches, Kernel::kKeys);
  if (status == kSuccess) status = map_of(call.v, p.v, p.Dv, p.Sk, p.Hk, batches, Kernel::kKeys);
  if (status != kSuccess) return status;
  return launch<Kernel>({std::min<int64_t>(blocks, grid.blocks())}, Kernel::kSharedBytes, stream, call);
}

// As for_width; one width more, 3 / 4 of the products of 256.
template <class F>
Status for_hopper_forward_width(const AttentionCall& call, F&& f) {
  const int64_t width = call.p.D > call.p.Dv ? call.p.D : call.p.Dv;
  return width > 128 && width <= 192 ? f(Width<192>{}) : for_width(call, f);
}

template <class T>
Status launch_hopper_forward(const AttentionCall& call, int blocks, int32_t* ticket, Stream stream) {
  return for_hopper_forward_width(call, [&](auto width) {
    return for_extra(call.p, [&](auto extra) {
      using Kernel = HopperForward<T, decltype(width)::value, decltype(extra)::value>;
      return launch_hopper_forward_kernel<Kernel>(call, blocks, ticket, stream);
    });
  });
}

}  // namespace tformer::gpu
