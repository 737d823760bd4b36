// Sizes of this machine's caches. They may decide how memory is read and written, never what is computed.
#pragma once

#include <cstddef>

namespace tformer {

// Bytes of one core's second-level cache and of the last-level cache that this process sees; those of common machines
// where the system does not tell.
struct CacheSizes {
  size_t second = size_t{1} << 20, last = size_t{32} << 20;
};

const CacheSizes& cache_sizes();

// Whether what is read and written, together `bytes`, had better not be written through the caches: most of it would be
// thrown out before somebody reads it, and a store past the caches need not read the line first. That pays, also for a
// reader who comes next, from one and a half times the last cache on.
inline bool exceeds_caches(size_t bytes) { return 2 * bytes >= 3 * cache_sizes().last; }

}  // namespace tformer
