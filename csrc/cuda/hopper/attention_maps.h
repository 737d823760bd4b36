// Tensors of an attention call as the copy engine sees them.
#pragma once

#include "../gpu/tensor_map.h"
#include "../params.h"

namespace tformer::gpu {

// Rows (B, H, S, width) in boxes of `rows` rows. Packed sequences are one batch.
inline Status map_of(TensorMap& map, const Rows& t, int64_t width, int64_t S, int64_t H, int64_t B, int rows) {
  const int64_t sizes[4] = {width, S, H, B};
  int64_t strides[3] = {t.stride[2], t.stride[1], t.stride[0]};
  for (int d = 0; d < 3; ++d) {
    if (sizes[d + 1] == 1) strides[d] = kBoxColumns;  // never walked along, but not any number is taken
  }
  return encode_tensor_map(map, t.data, sizes, strides, rows);
}

}  // namespace tformer::gpu
