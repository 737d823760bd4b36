#include "block_cache.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tformer {
namespace {

constexpr size_t kHugePage = size_t{2} << 20, kMediumStep = size_t{64} << 10;

bool is_large(size_t bytes) { return bytes >= BlockCache::kLargeBlock; }

size_t rounded(size_t bytes) {
  const size_t step = is_large(bytes) ? kHugePage : kMediumStep;
  return (bytes + step - 1) / step * step;
}

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)

size_t machine_bytes() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
}

// Large ones aligned to huge pages, and a whole number of them.
void* map_block(size_t bytes) {
  if (!is_large(bytes)) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mapped == MAP_FAILED ? nullptr : mapped;
  }
  const size_t wider = bytes + kHugePage;
  void* mapped = mmap(nullptr, wider, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + bytes, kHugePage - before);
  madvise(begin + before, bytes, MADV_HUGEPAGE);  // advice: where it is refused the pages are small
  return begin + before;
}

void unmap_block(void* data, size_t bytes) { munmap(data, bytes); }

void mark_reclaimable(void* data, size_t bytes) { madvise(data, bytes, MADV_FREE); }

bool can_map() { return true; }

#else

// A limit of 0 at first and no block ever mapped: results come from torch's allocator.
size_t machine_bytes() { return 0; }
void* map_block(size_t) { return nullptr; }
void unmap_block(void*, size_t) {}
void mark_reclaimable(void*, size_t) {}
bool can_map() { return false; }

#endif

}  // namespace

BlockCache& BlockCache::instance() {
  static BlockCache* const cache = new BlockCache;  // never destroyed: tensors may outlive static objects
  return *cache;
}

BlockCache::BlockCache() : limit_(machine_bytes() / 8) {}

void* BlockCache::take(size_t bytes) {
  if (bytes < kSmallestBlock) return nullptr;
  bytes = rounded(bytes);
  // Never waits: after a fork another thread's lock would stay locked.
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || limit_ == 0) return nullptr;
  for (size_t n = kept_.size(); n-- > 0;) {
    if (kept_[n].bytes != bytes) continue;
    void* data = kept_[n].data;
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(n));
    kept_bytes_ -= bytes;
    return data;
  }
  return map_block(bytes);
}

void BlockCache::give_back(void* data, size_t bytes) noexcept {
  bytes = rounded(bytes);
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || bytes > limit_) return unmap_block(data, bytes);
  if (is_large(bytes)) mark_reclaimable(data, bytes);
  kept_.push_back({data, bytes});
  kept_bytes_ += bytes;
  size_t medium = 0;
  for (size_t n = kept_.size(); n-- > 0;) {  // the newest stay
    if (is_large(kept_[n].bytes)) continue;
    medium += kept_[n].bytes;
    if (medium > kMediumBytes) drop(n);
  }
  shrink_to(limit_);
}

size_t BlockCache::set_limit(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t before = limit_;
  limit_ = can_map() ? bytes : 0;
  shrink_to(limit_);
  return before;
}

size_t BlockCache::kept_bytes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept_bytes_;
}

void BlockCache::shrink_to(size_t bytes) {
  while (kept_bytes_ > bytes) drop(0);
}

void BlockCache::drop(size_t n) {
  unmap_block(kept_[n].data, kept_[n].bytes);
  kept_bytes_ -= kept_[n].bytes;
  kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(n));
}

}  // namespace tformer
