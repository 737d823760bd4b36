// Included by the file that compiles the forward kernels of a dtype.
#pragma once

#include "attention_dispatch.h"
#include "attention_few_queries.h"
#include "attention_forward.h"
#include "attention_forward_few.h"

namespace tformer::gpu {

template <class Kernel>
Status launch_forward_kernel(AttentionCall call, Stream stream) {
  call.grid = grid_of(call, Kernel::kRows, call.p.Sq, call.p.Hq, call.p.Sk * call.p.Hk / call.p.Hq);
  call.grid.splits = call.splits;
  call.grid.last_tile_first = call.p.causal != kNotCausal;
  return launch<Kernel>({call.grid.blocks()}, Kernel::kSharedBytes, stream, call);
}

template <class T>
Status launch_forward(const AttentionCall& call, Stream stream) {
  return for_kernel<T>(call, [&](auto width, auto plain) {
    constexpr int kWidth = decltype(width)::value;
    constexpr bool kPlain = decltype(plain)::value;
    if constexpr (kPlain && kWidth <= kMostWidthOfFew) {
      if (has_few_queries(call)) return launch_forward_kernel<AttentionFewQueries<T, kWidth>>(call, stream);
    }
    return launch_forward_kernel<AttentionForward<T, kWidth, kPlain>>(call, stream);
  });
}

}  // namespace tformer::gpu
