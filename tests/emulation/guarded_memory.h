// Memory that borders on a page nobody may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

namespace tformer::gpu::emulation {

// Memory from the system whose end, or whose beginning, borders on a page that nobody may touch.
class GuardedMemory {
 public:
  enum class Guard { before, after };

  GuardedMemory(size_t bytes, Guard guard) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    bytes_ = (bytes + page_ - 1) / page_ * page_ + page_;
    void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<char*>(data);
    mprotect(guard == Guard::before ? data_ : data_ + bytes_ - page_, page_, PROT_NONE);
    begin_ = guard == Guard::before ? data_ + page_ : data_;
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(data_, bytes_); }

  char* begin() const { return begin_; }
  char* end() const { return begin_ + (bytes_ - page_); }

 private:
  size_t page_, bytes_;
  char *data_, *begin_;
};

}  // namespace tformer::gpu::emulation
