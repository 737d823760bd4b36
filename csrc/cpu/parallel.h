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

// What one thread takes from a queue of tasks.
class TaskTaker {
 public:
  explicit TaskTaker(std::atomic<int64_t>& queue) : queue_(queue) {}

  // The task to do now.
  int64_t take() {
    const int64_t task = take_ahead();
    ahead_ = kNone;
    return task;
  }
  // The one that take() gives next.
  int64_t take_ahead() {
    if (ahead_ == kNone) ahead_ = queue_++;
    return ahead_;
  }

 private:
  static constexpr int64_t kNone = -1;
  std::atomic<int64_t>& queue_;
  int64_t ahead_ = kNone;
};

// run(index, taker) for each of `count` tasks, in that order, taken by whichever thread is free. Tasks write to
// disjoint memory, so which thread takes one does not show in the result. Work below `kMinimumCost` (about 20
// microseconds of arithmetic) stays on the calling thread: waking the others would cost more.
template <class Run>
void parallel_tasks(int64_t count, double total_cost, const Run& run) {
  constexpr double kMinimumCost = 1e6;
  const int64_t threads = total_cost < kMinimumCost ? 1 : std::min(thread_count(), count);
  std::atomic<int64_t> queue{0};
  if (threads <= 1) {
    TaskTaker taker(queue);
    for (int64_t n = taker.take(); n < count; n = taker.take()) run(n, taker);
    return;
  }
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        TaskTaker taker(queue);
        for (int64_t n = taker.take(); n < count && !failed; n = taker.take()) run(n, taker);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace tformer
