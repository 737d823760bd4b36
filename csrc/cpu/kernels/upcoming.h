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
    parts_[count_++] = {rows, stride, count, width};
    rows_ += count, bytes_ += count * width * static_cast<int64_t>(sizeof(T));
  }

  // To be fetched in `calls` calls of fetch(); not at all if it would push out what is at work now.
  void spread_over(int64_t calls) {
    constexpr int64_t kMostBytes = 256 * 1024;
    if (bytes_ > kMostBytes || calls <= 0) return;
    share_ = (rows_ + calls - 1) / calls;
    begin_part();
  }

  // The next rows, of one part at most. In a loop over registers alone: this is called beside every few products.
  TFORMER_INLINE void fetch() {
    const int64_t count = now_.count < share_ ? now_.count : share_;
    if (count == 0) return;
    const T* row = now_.rows;
    for (int64_t n = 0; n < count; ++n, row += now_.stride) fetch_row(row, now_.width);
    now_.rows = row;
    now_.count -= count;
    if (now_.count == 0) begin_part();
  }

 private:
  struct Part {
    const T* rows;
    int64_t stride, count, width;
  };
  void begin_part() {
    if (at_ < count_) now_ = parts_[at_++];
  }

  Part parts_[5] = {}, now_ = {};
  int count_ = 0, at_ = 0;
  int64_t rows_ = 0, bytes_ = 0, share_ = 0;
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
