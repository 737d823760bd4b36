// csrc/cuda/runtime.cpp and tensor_map.cpp on the host, and memory of results that shows what a kernel leaves out or
// overruns.
#include "../../csrc/cuda/runtime.h"

#include "asynchronous.h"
#include "emulator.h"
#include "guarded_memory.h"

namespace tformer {
namespace gpu {

static Device emulated_device{8, 0, 3, emulation::kMostSharedBytes};
static bool hopper_kernels = false;

OnDevice::OnDevice(const Tensor& t) : device_(&emulated_device), stream_{nullptr, 0} {
  check(t.is_cpu(), "the emulation runs on CPU tensors");
}

bool hopper_is_wanted() { return hopper_kernels; }

void check_launch(Status status, const char* kernel) {
  check(status == kSuccess, kernel, ": ", emulation::last_error());
}

// csrc/cuda/tensor_map.cpp on the host: what cuTensorMapEncodeTiled refuses is refused.
Status encode_tensor_map(TensorMap& map, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                         int rows) {
  emulation::MapFields fields{static_cast<const char*>(data), {}, {}, rows};
  static_assert(sizeof fields <= sizeof map);
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows >= 1 && rows <= 256;
  for (int d = 0; d < 4; ++d) {
    fields.sizes[d] = sizes[d];
    fits = fits && sizes[d] >= 1 && sizes[d] <= int64_t{1} << 32;
  }
  for (int d = 0; d < 3; ++d) {
    fields.strides[d] = 2 * strides[d];
    fits = fits && strides[d] > 0 && fields.strides[d] % 16 == 0 && fields.strides[d] < int64_t{1} << 40;
  }
  if (!fits)
    return emulation::refuse("encode_tensor_map: a size, stride or address that the copy engine does not take");
  std::memcpy(&map, &fields, sizeof fields);
  return kSuccess;
}

}  // namespace gpu

// In place of csrc/cpu/block_cache.cpp: NaN patterns up to a page that nobody may touch.
BlockCache& BlockCache::instance() {
  static BlockCache cache;
  return cache;
}
BlockCache::BlockCache() : limit_(0) {}

namespace {
using Guarded = gpu::emulation::GuardedMemory;
std::mutex mutex;
std::vector<std::pair<void*, std::unique_ptr<Guarded>>> taken;
}  // namespace

void* BlockCache::take(size_t bytes) {
  constexpr size_t kAlign = 16;  // torch's is larger; the end is what matters
  if (bytes == 0) return nullptr;
  const size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
  auto memory = std::make_unique<Guarded>(rounded, Guarded::Guard::after);
  char* data = memory->end() - rounded;
  std::memset(data, gpu::emulation::poison, rounded);
  const std::lock_guard<std::mutex> lock(mutex);
  taken.emplace_back(data, std::move(memory));
  return data;
}

void BlockCache::give_back(void* data, size_t) noexcept {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::find_if(taken.begin(), taken.end(), [&](const auto& t) { return t.first == data; });
  if (found != taken.end()) taken.erase(found);
}

}  // namespace tformer

extern "C" {

__attribute__((visibility("default"))) void tformer_set_emulation_seed(uint64_t seed) {
  tformer::gpu::emulation::set_seed(seed);
}
__attribute__((visibility("default"))) void tformer_set_emulation_poison(int byte) {
  tformer::gpu::emulation::poison = static_cast<unsigned char>(byte);
}
__attribute__((visibility("default"))) const char* tformer_emulation_error() {
  return tformer::gpu::emulation::last_error();
}

__attribute__((visibility("default"))) void* tformer_take_guarded(size_t bytes) {
  return tformer::BlockCache::instance().take(bytes);
}
__attribute__((visibility("default"))) void tformer_give_back_guarded(void* data) {
  tformer::BlockCache::instance().give_back(data, 0);
}
__attribute__((visibility("default"))) void tformer_set_emulated_shared_bytes(size_t bytes) {
  tformer::gpu::emulated_device.shared_bytes = bytes;
}
__attribute__((visibility("default"))) void tformer_set_emulated_device(int major, int minor, int hopper_kernels) {
  tformer::gpu::emulated_device.major = major, tformer::gpu::emulated_device.minor = minor;
  tformer::gpu::hopper_kernels = hopper_kernels != 0;
  tformer::gpu::emulation::set_most_shared_bytes(major >= 9 ? tformer::gpu::emulation::kMostSharedBytesOfHopper
                                                            : tformer::gpu::emulation::kMostSharedBytes);
}
__attribute__((visibility("default"))) int64_t tformer_emulated_boxes() {
  return tformer::gpu::emulation::moved_boxes();
}
__attribute__((visibility("default"))) int64_t tformer_emulated_blocks() {
  return tformer::gpu::emulation::launched_blocks();
}

}  // extern "C"
