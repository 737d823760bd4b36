// What host files ask of the CUDA runtime, without its headers. runtime.cpp answers; the tests have another answer.
#pragma once

#include <memory>

#include "../host/registration.h"
#include "../host/tensors.h"
#include "gpu/launch.h"

namespace tformer::gpu {

struct Device {
  int major, minor;     // compute capability
  int multiprocessors;  // each runs blocks on its own
  size_t shared_bytes;  // that a block may have at most
};

// The device of a tensor, current as long as this lives, and torch's stream on it. std::runtime_error where the device
// is older than sm_80.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t);

  const Device& device() const { return *device_; }
  Stream stream() const { return stream_; }

 private:
  std::shared_ptr<void> guard_;
  const Device* device_;
  Stream stream_;
};

// Whether the kernels for sm_90a may be taken: not with TFORMER_EXT_SM90=0. std::runtime_error: neither 0 nor 1.
bool hopper_is_wanted();

// std::runtime_error that names the kernel unless the launch succeeded.
void check_launch(Status status, const char* kernel);

}  // namespace tformer::gpu
