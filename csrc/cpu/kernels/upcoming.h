// Rows asked of memory before their use. Short sequences are bound by memory otherwise: a head's rows are read once,
// and computed with for no longer than it takes to fetch them.
#pragma once

#include <type_traits>

#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

// Inlined, as all that only prefetches has to be: gcc takes such a function for one without effects, and drops calls
// of it.
template <class T>
TFORMER_INLINE void prefetch_row(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d);
}

// Likewise, but into the second-level cache.
template <class T>
TFORMER_INLINE void fetch_row(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d, 0, 2);
}

// Likewise, for a row that will be written soon.
template <class T>
TFORMER_INLINE void fetch_row_to_write(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d, 1);
}

// What will be read next, on its way into the second-level cache beside products. Rows of heads lie apart, so that the
// CPU does not see them coming. Requests are spread evenly: a CPU may drop those that come while it waits for as many
// lines as it can.
template <class T>
class Upcoming {
 public:
  void add(const T* rows, int64_t stride, int64_t count, int64_t width) {
    if (count <= 0) return;
    parts_[count_++] = {rows, stride, count, width};
    rows_ += count;
  }

  // Whether so many numbers can wait in the second-level cache without pushing out what is at work.
  static bool fits(int64_t numbers) {
    constexpr int64_t kMostBytes = 256 * 1024;
    return numbers * static_cast<int64_t>(sizeof(T)) <= kMostBytes;
  }

  // To be fetched in `calls` calls of fetch().
  void spread_over(int64_t calls) {
    if (calls <= 0) return;
    share_ = (rows_ + calls - 1) / calls;
    begin_part();
  }

  // The next rows, of one part at most. In loops over registers alone: this is called beside every few products.
  TFORMER_INLINE void fetch() {
    const int64_t count = now_.count < share_ ? now_.count : share_;
    if (count == 0) return;
    const T* row = now_.rows;
    constexpr int64_t kLine = 64 / sizeof(T);
    const auto fetch_rows = [&](auto width) TFORMER_LAMBDA {
      for (int64_t n = 0; n < count; ++n, row += now_.stride) fetch_row(row, width);
    };
    // heads of 64: a loop over lines whose end is not known is a mispredicted branch a row
    if (now_.width == 2 * kLine) {
      fetch_rows(std::integral_constant<int64_t, 2 * kLine>{});
    } else if (now_.width == 4 * kLine) {
      fetch_rows(std::integral_constant<int64_t, 4 * kLine>{});
    } else {
      fetch_rows(now_.width);
    }
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

  Part parts_[7] = {}, now_ = {};
  int count_ = 0, at_ = 0;
  int64_t rows_ = 0, share_ = 0;
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
