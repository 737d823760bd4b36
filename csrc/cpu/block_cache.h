// Memory of large results, kept when they are freed.
//
// The C library gives large blocks back to the system when they are freed and maps new ones for the next result, and
// the system clears every page of them: that takes longer than most kernels take to fill them. Blocks kept here stay
// mapped. Large ones are in huge pages, and marked as free to take (MADV_FREE), so that the system reclaims them before
// it runs short; what it has not reclaimed is reused at no cost. In small pages marking takes as long as writing, so
// medium blocks are not marked, and few are kept.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace tformer {

class BlockCache {
 public:
  // Smaller ones the C library keeps itself. Of these, and of some times their size, it gives the end of its heap back.
  static constexpr size_t kSmallestBlock = size_t{256} << 10, kLargeBlock = size_t{4} << 20;
  static constexpr size_t kMediumBytes = size_t{32} << 20;  // kept at most in blocks below kLargeBlock

  static BlockCache& instance();

  // Uninitialised memory, or nullptr: a small block, a cache that is off or in use by another thread, none to be had.
  void* take(size_t bytes);
  // bytes as in take. From any thread.
  void give_back(void* data, size_t bytes) noexcept;
  // Bytes kept at most; 0: the cache is off. At first an eighth of the machine's memory. Returns the limit before.
  size_t set_limit(size_t bytes);
  size_t kept_bytes();

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  BlockCache();
  void shrink_to(size_t bytes);
  void drop(size_t n);

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  size_t kept_bytes_ = 0, limit_;
};

}  // namespace tformer
