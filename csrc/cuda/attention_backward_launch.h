// Included by the files that compile the backward kernels of a dtype.
#pragma once

#include "attention_dispatch.h"
#include "attention_dkv.h"
#include "attention_dq.h"

namespace tformer::gpu {

template <class Kernel>
Status launch_dkv_kernel(AttentionCall call, Stream stream) {
  const AttentionParams& p = call.p;
  call.grid = grid_of(call, Kernel::kRows, p.Sk, p.Hk, p.Sq * p.Hq / p.Hk);
  return launch<Kernel>({call.grid.blocks()}, Kernel::kSharedBytes, stream, call);
}

template <class T>
Status launch_dkv(const AttentionCall& call, Stream stream) {
  return for_kernel<T>(call, [&](auto width, auto plain) {
    constexpr int kWidth = decltype(width)::value;
    constexpr bool kPlain = decltype(plain)::value;
    if constexpr (kWidth > 128) {
      const Status status = launch_dkv_kernel<AttentionKeyGradients<T, kWidth, kPlain, Wanted::keys>>(call, stream);
      if (status != kSuccess) return status;
      return launch_dkv_kernel<AttentionKeyGradients<T, kWidth, kPlain, Wanted::values>>(call, stream);
    } else {
      return launch_dkv_kernel<AttentionKeyGradients<T, kWidth, kPlain, Wanted::both>>(call, stream);
    }
  });
}

template <class T>
Status launch_dq(const AttentionCall& given, Stream stream) {
  return for_kernel<T>(given, [&](auto width, auto plain) {
    using Kernel = AttentionQueryGradients<T, decltype(width)::value, decltype(plain)::value>;
    AttentionCall call = given;
    const AttentionParams& p = call.p;
    call.grid = grid_of(call, Kernel::kRows, p.Sq, p.Hq, p.Sk * p.Hk / p.Hq);
    call.grid.last_tile_first = p.causal != kNotCausal;
    if (!call.packed) call.grid.heads /= call.shared_batches * call.shared_heads;
    call.grid.splits = call.parts;
    return launch<Kernel>({call.grid.blocks()}, Kernel::kSharedBytes, stream, call);
  });
}

}  // namespace tformer::gpu
