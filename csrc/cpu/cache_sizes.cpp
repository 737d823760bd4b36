#include "cache_sizes.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace tformer {

// From sysfs: the C library's sysconf adds up the caches of a whole package, also in a virtual machine that has a part
// of one of them.
const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = [] {
    size_t second = 0, last = 0, size = 0;
    for (int index = 0; index < 8; ++index) {
      const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
      std::ifstream size_file(folder + "/size"), level_file(folder + "/level");
      char unit = 0;
      int level = 0;
      if (!(size_file >> size >> unit) || !(level_file >> level)) continue;
      size <<= unit == 'M' ? 20 : 10;
      last = std::max(last, size);
      if (level == 2) second = std::max(second, size);
    }
    CacheSizes found;
    if (second > 0) found.second = second;
    if (last > 0) found.last = last;
    return found;
  }();
  return sizes;
}

}  // namespace tformer
