// Working memory of one thread, cut into aligned pieces. Run once over a null base it only counts the bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tformer::TFORMER_ISA {
namespace {

class Scratch {
 public:
  explicit Scratch(void* base) : base_(reinterpret_cast<uintptr_t>(base)), used_(0) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlign = 64;
  uintptr_t base_;
  size_t used_;
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
