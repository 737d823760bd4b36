// What the next head will read, on its way into the second-level cache while this head is computed. Short sequences are
// bound by memory otherwise: a head's rows are read once, and computed with for no longer than it takes to fetch them.
#pragma once

#include "packing.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class T>
class Upcoming {
 public:
  void add(const T* rows, int64_t stride, int64_t count, int64_t width) {
    if (count <= 0) return;
    part_[parts_++] = {rows, stride, count, width};
    rows_ += count, bytes_ += count * width * static_cast<int64_t>(sizeof(T));
  }

  // To be fetched in `calls` calls of fetch(); not at all if it would push out what is at work now.
  void spread_over(int64_t calls) {
    constexpr int64_t kMostBytes = 256 * 1024;
    share_ = bytes_ > kMostBytes || calls <= 0 ? 0 : (rows_ + calls - 1) / calls;
  }

  TFORMER_INLINE void fetch() {
    for (int64_t n = 0; n < share_ && at_ < parts_; ++n) {
      Part& part = part_[at_];
      fetch_row(part.rows, part.width);
      part.rows += part.stride;
      if (--part.count == 0) ++at_;
    }
  }

 private:
  struct Part {
    const T* rows;
    int64_t stride, count, width;
  };
  Part part_[5] = {};
  int parts_ = 0, at_ = 0;
  int64_t rows_ = 0, bytes_ = 0, share_ = 0;
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
