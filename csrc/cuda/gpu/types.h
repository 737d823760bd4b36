// Values that kernels hold, the same for both implementations of gpu/device.h.
#pragma once

#include <cstdint>

namespace tformer::gpu {

constexpr int kWarp = 32;

// 16-bit floats as their bits: only gpu/device.h converts them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What one access moves.
struct alignas(16) Bits16Bytes {
  uint32_t word[4];
};

}  // namespace tformer::gpu
