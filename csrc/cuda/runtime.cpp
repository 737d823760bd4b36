#include "runtime.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <unordered_map>

// In libtorch_cuda, which a torch for the CPU lacks: null there, where no CUDA tensor can get here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace tformer::gpu {
namespace {

void check_runtime(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();
    check(false, what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
  }
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check_runtime(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

// Asked for once: attributes do not change, and the driver takes microseconds.
const Device& device_at(int index) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device device{attribute(cudaDevAttrComputeCapabilityMajor, index),
                attribute(cudaDevAttrComputeCapabilityMinor, index), attribute(cudaDevAttrMultiProcessorCount, index),
                static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index))};
  check(device.major >= 8, "the kernels need a GPU of compute capability 8.0 or newer, device ", index, " has ",
        device.major, ".", device.minor);
  return known.emplace(index, device).first->second;
}

}  // namespace

OnDevice::OnDevice(const Tensor& t) {
  const int index = t.get_device_index();
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  if (torch::stable::accelerator::getCurrentDeviceIndex() != index) {
    guard_ = std::make_shared<torch::stable::accelerator::DeviceGuard>(index);
  }
  device_ = &device_at(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  stream_ = {stream, index};
}

bool hopper_is_wanted() {
  static const bool wanted = [] {
    const char* setting = std::getenv("TFORMER_EXT_SM90");
    const std::string value = setting ? setting : "";
    check(value.empty() || value == "0" || value == "1", "TFORMER_EXT_SM90: expected 0 or 1, got '", value, "'");
    return value != "0";
  }();
  return wanted;
}

void check_launch(Status status, const char* kernel) {
  if (status == kSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  const bool no_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
                       error == cudaErrorUnsupportedPtxVersion;
  check(false, kernel, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")",
        no_code ? "; this build has no code for the GPU, _C.build_info()[\"cuda\"] tells for which it has" : "");
}

}  // namespace tformer::gpu
