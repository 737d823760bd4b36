// A function that runs on a stack of its own and can be left and entered again. Included once: it defines a function in
// assembly.
#pragma once

#include <cstddef>
#include <cstring>

#include "guarded_memory.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace tformer::gpu::emulation {

#if defined(__x86_64__)

// Saves the callee's registers of the System V ABI on the stack, then the stack pointer in *from; continues where `to`
// was saved.
extern "C" void tformer_switch_stack(void** from, void* to);
asm(R"(
.text
.type tformer_switch_stack, @function
.hidden tformer_switch_stack
.globl tformer_switch_stack
tformer_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tformer_switch_stack, .-tformer_switch_stack
)");

class Fibre {
 public:
  // The next enter() calls `main`, which must not return. What main's frames hold at first is `poison`. Stacks begin at
  // different offsets in their pages, or all would want the same few lines of the cache.
  void start(void (*main)(), int index, int poison) {
    std::memset(stack_.end() - kPoisoned, poison, kPoisoned);
    void** top = reinterpret_cast<void**>(stack_.end() - index % 32 * 320);
    *--top = nullptr;  // main has no caller; as after a call the address of this is 8 more than a multiple of 16
    *--top = reinterpret_cast<void*>(main);
    own_ = top - kSavedRegisters;
  }
  void enter() { tformer_switch_stack(&caller_, own_); }
  void leave() { tformer_switch_stack(&own_, caller_); }

 private:
  static constexpr int kSavedRegisters = 6;
  static constexpr size_t kPoisoned = 16 << 10;
  GuardedMemory stack_{size_t{256} << 10, GuardedMemory::Guard::before};
  void *own_ = nullptr, *caller_ = nullptr;
};

#else

class Fibre {
 public:
  void start(void (*main)(), int, int poison) {
    std::memset(stack_.begin(), poison, static_cast<size_t>(stack_.end() - stack_.begin()));
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.begin();
    own_.uc_stack.ss_size = static_cast<size_t>(stack_.end() - stack_.begin());
    own_.uc_link = nullptr;
    makecontext(&own_, main, 0);
  }
  void enter() { swapcontext(&caller_, &own_); }
  void leave() { swapcontext(&own_, &caller_); }

 private:
  GuardedMemory stack_{size_t{256} << 10, GuardedMemory::Guard::before};
  ucontext_t own_{}, caller_{};
};

#endif

}  // namespace tformer::gpu::emulation
