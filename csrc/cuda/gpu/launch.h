// What host files see of a launch: no CUDA header here. gpu/device.h launches, runtime.h asks about devices.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tformer::gpu {

struct Grid {
  int64_t x = 1, y = 1, z = 1;  // blocks: x up to 2^31 - 1, y and z up to 65535
};

struct Stream {
  void* handle;  // a cudaStream_t
  int device;
};

// What a launch returns: kSuccess, or a code for describe() of runtime.h.
using Status = int;
constexpr Status kSuccess = 0;

}  // namespace tformer::gpu
