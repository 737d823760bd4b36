// From an AttentionCall to one of the compiled kernels and its grid.
#pragma once

#include <gpu/device.h>

#include "attention_launch.h"

namespace tformer::gpu {

// One function for each dtype and kernel, compiled apart.
template <class T>
Status launch_forward(const AttentionCall& call, Stream stream);
template <class T>
Status launch_one_pass(const OnePassCall& call, size_t shared_bytes, Stream stream);
template <class T>
Status launch_dkv(const AttentionCall& call, Stream stream);
template <class T>
Status launch_dq(const AttentionCall& call, Stream stream);

// Tiles of `rows` of the `length` positions, for `heads` heads; `passing` positions pass by each head's tiles.
inline WorkGrid grid_of(const AttentionCall& call, int rows, int64_t length, int64_t heads, int64_t passing) {
  constexpr int64_t kCachedBytes = int64_t{16} << 20;  // a part of the smallest L2 that counts
  const AttentionParams& p = call.p;
  WorkGrid grid{};
  grid.tiles = call.packed ? length / rows + p.B : (length + rows - 1) / rows;
  grid.heads = call.packed ? heads : p.B * heads;
  const int64_t bytes = (call.packed ? passing / (p.B > 0 ? p.B : 1) : passing) * (p.D + p.Dv) * 2 + 1;
  grid.heads_together = kCachedBytes / bytes + 1;
  grid.splits = 1;
  return grid;
}

// f(std::integral_constant<int, width>) for the narrowest compiled width of head dimensions.
template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};
template <class F>
Status for_width(const AttentionCall& call, F&& f) {
  const int64_t width = call.p.D > call.p.Dv ? call.p.D : call.p.Dv;
  if (width <= 64) return f(Width<64>{});
  if (width <= 128) return f(Width<128>{});
  return f(Width<256>{});
}

template <bool kPlain>
struct Plain {
  static constexpr bool value = kPlain;
};

// f(Width, Plain).
template <class T, class F>
Status for_kernel(const AttentionCall& call, F&& f) {
  return for_width(call, [&](auto width) {
    if constexpr (sizeof(T) == 2) {
      if (is_plain(call)) return f(width, Plain<true>{});
    }
    return f(width, Plain<false>{});
  });
}

}  // namespace tformer::gpu
