// Included by the files that compile the backward kernels of a dtype.
#pragma once

#include "attention_dispatch.h"
#include "attention_dkv.h"
#include "attention_dq.h"
#include "attention_dqkv.h"

namespace tformer::gpu {

template <class T, int kWidth, int kKeys, bool kPlain>
Status launch_one_pass_kernels(OnePassCall call, Stream stream) {
  using Kernel = AttentionGradients<T, kWidth, kKeys, kPlain>;
  const AttentionParams& p = call.call.p;
  call.call.grid = grid_of(call.call, kKeys, p.Sk, p.Hk, p.Sq * p.Hq / p.Hk);
  const Status status = launch<Kernel>({call.call.grid.blocks()}, Kernel::kSharedBytes, stream, call);
  if (status != kSuccess) return status;
  using QueryKernel = QueryGradientsOfSums<T, kWidth, typename Kernel::Sums, OnePassCall>;
  call.call.grid = grid_of(call.call, kOnePassQueries, p.Sq, p.Hq, 0);
  return launch<QueryKernel>({call.call.grid.blocks()}, QueryKernel::kSharedBytes, stream, call);
}

// Tiles of 128 keys; of 64 above width 128, and above 64 where a block has not the shared memory (sm_86, sm_89,
// sm_120), which goes_in_one_pass grants to plain calls alone.
template <class T>
Status launch_one_pass(const OnePassCall& call, size_t shared_bytes, Stream stream) {
  return for_kernel<T>(call.call, [&](auto width, auto plain) {
    constexpr int kWidth = decltype(width)::value, kKeys = kWidth <= 128 ? 128 : 64;
    constexpr bool kPlain = decltype(plain)::value;
    static_assert(kWidth == 64 || AttentionGradients<T, kWidth, kKeys, kPlain>::kSharedBytes <= kOnePassBytes);
    if constexpr (kWidth == 128 && kPlain) {
      if (shared_bytes < kOnePassBytes) return launch_one_pass_kernels<T, kWidth, 64, kPlain>(call, stream);
    }
    return launch_one_pass_kernels<T, kWidth, kKeys, kPlain>(call, stream);
  });
}

template <class Kernel>
Status launch_dkv_kernel(AttentionCall call, Stream stream) {
  const AttentionParams& p = call.p;
  call.grid = grid_of(call, Kernel::kRows, p.Sk, p.Hk, p.Sq * p.Hq / p.Hk);
  return launch<Kernel>({call.grid.blocks()}, Kernel::kSharedBytes, stream, call);
}

template <class T>
Status launch_dkv(const AttentionCall& call, Stream stream) {
  return for_width(call, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if constexpr (kWidth > 128) {
      const Status status = launch_dkv_kernel<AttentionKeyGradients<T, kWidth, Wanted::keys>>(call, stream);
      if (status != kSuccess) return status;
      return launch_dkv_kernel<AttentionKeyGradients<T, kWidth, Wanted::values>>(call, stream);
    } else {
      return launch_dkv_kernel<AttentionKeyGradients<T, kWidth, Wanted::both>>(call, stream);
    }
  });
}

template <class T>
Status launch_dq(const AttentionCall& given, Stream stream) {
  return for_width(given, [&](auto width) {
    using Kernel = AttentionQueryGradients<T, decltype(width)::value>;
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
