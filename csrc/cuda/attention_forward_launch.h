// Included by the file that compiles the forward kernels of a dtype.
#pragma once

#include "attention_dispatch.h"
#include "attention_forward.h"

namespace tformer::gpu {

template <class T>
Status launch_forward(const AttentionCall& given, Stream stream) {
  return for_kernel<T>(given, [&](auto width, auto plain) {
    using Kernel = AttentionForward<T, decltype(width)::value, decltype(plain)::value>;
    AttentionCall call = given;
    call.grid = grid_of(call, Kernel::kRows, call.p.Sq, call.p.Hq, call.p.Sk * call.p.Hk / call.p.Hq);
    call.grid.splits = call.splits;
    call.grid.last_tile_first = call.p.causal != kNotCausal;
    return launch<Kernel>({call.grid.blocks()}, Kernel::kSharedBytes, stream, call);
  });
}

}  // namespace tformer::gpu
