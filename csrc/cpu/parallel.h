// Threads of an op on the CPU: torch's own pool, a work queue in order of falling cost, scratch that a thread keeps.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

namespace tformer {

// Grow-only, aligned working memory of the calling thread; kept between calls up to a bound.
class ThreadScratch {
 public:
  static void* get(size_t bytes) {
    thread_local ThreadScratch mine;
    if (bytes > mine.bytes_) {
      std::free(mine.data_);
      mine.bytes_ = 0;
      mine.data_ = std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
      if (!mine.data_) throw std::bad_alloc();
      mine.bytes_ = bytes;
    }
    return mine.data_;
  }
  ~ThreadScratch() { std::free(data_); }

 private:
  static constexpr size_t kAlign = 64;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// run(index) for each of `count` tasks, in that order, taken by whichever thread is free. Tasks write to disjoint
// memory, so which thread takes one does not show in the result. Work below `kMinimumCost` (about 20 microseconds of
// arithmetic) stays on the calling thread: waking the others would cost more.
template <class Run>
void parallel_tasks(int64_t count, double total_cost, const Run& run) {
  constexpr double kMinimumCost = 1e6;
  const int64_t threads = total_cost < kMinimumCost ? 1 : std::min(thread_count(), count);
  if (threads <= 1) {
    for (int64_t n = 0; n < count; ++n) run(n);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        for (int64_t n = next++; n < count && !failed; n = next++) run(n);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace tformer
