// Threads of an op on the CPU: torch's own pool, queues of tasks, scratch that a thread keeps.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
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

// Tasks that follow each other and of which none has been taken before `next`.
struct alignas(64) TaskQueue {  // a line of its own
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// What one thread takes from queues of tasks: first from its own one, then from the others.
class TaskTaker {
 public:
  TaskTaker(TaskQueue* queues, int64_t count, int64_t own) : queues_(queues), count_(count), at_(own % count) {}

  // The task to do now.
  int64_t take() {
    const int64_t task = take_ahead();
    ahead_ = kNone;
    return task;
  }
  // The one that take() gives next.
  int64_t take_ahead() {
    while (ahead_ == kNone) {
      TaskQueue& queue = queues_[at_];
      if (const int64_t n = queue.next++; n < queue.end) {
        ahead_ = n;
      } else if (++empty_ < count_) {
        at_ = (at_ + 1) % count_;
      } else {
        ahead_ = kNoMore;
      }
    }
    return ahead_;
  }

  static constexpr int64_t kNoMore = std::numeric_limits<int64_t>::max();

 private:
  static constexpr int64_t kNone = -1;
  TaskQueue* queues_;
  const int64_t count_;  // of the queues
  int64_t at_, empty_ = 0, ahead_ = kNone;
};

// Which tasks a thread takes: whichever comes next, so that costly ones, which are the first, are begun first; or
// neighbours, the same in every call and those that torch's own operators give to that thread, since what it has read
// or written last may still be in its core's caches.
enum class Share { kNext, kNeighbours };

// run(index, taker) for each of `count` tasks; no thread is idle while there are some. Tasks write to disjoint memory,
// so which thread takes one does not show in the result. Work below `kMinimumCost` (about 20 microseconds of
// arithmetic) stays on the calling thread: waking the others would cost more.
template <class Run>
void parallel_tasks(int64_t count, double total_cost, Share share, const Run& run) {
  constexpr double kMinimumCost = 1e6;
  const int64_t threads = total_cost < kMinimumCost ? 1 : std::min(thread_count(), count);
  const int64_t shares = share == Share::kNeighbours && threads > 1 ? threads : 1;
  TaskQueue only;
  const std::unique_ptr<TaskQueue[]> several(shares > 1 ? new TaskQueue[static_cast<size_t>(shares)] : nullptr);
  TaskQueue* queues = several ? several.get() : &only;
  for (int64_t n = 0; n < shares; ++n) queues[n].next = count * n / shares, queues[n].end = count * (n + 1) / shares;
  if (threads <= 1) {
    TaskTaker taker(queues, shares, 0);
    for (int64_t n = taker.take(); n != TaskTaker::kNoMore; n = taker.take()) run(n, taker);
    return;
  }
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        TaskTaker taker(queues, shares, worker);
        for (int64_t n = taker.take(); n != TaskTaker::kNoMore && !failed; n = taker.take()) run(n, taker);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace tformer
