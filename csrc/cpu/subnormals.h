// What the calling thread's floating-point arithmetic makes of numbers below the smallest normal one.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tformer {

// While it lives, all threads compute alike, whatever the caller has set for its own (torch.set_flush_denormal). On
// x86-64 results below the smallest normal number are 0: weights of a sharp softmax pass through that range by the
// thousand, and multiplications with them take some CPUs many times as long. Operands stay what they are; on
// aarch64, which would flush them too, so do results.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(control()) { set_control(kInForce); }
  ~FlushSubnormals() { set_control(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  using Control = unsigned;
  static constexpr Control kInForce = 0x1f80 | 0x8000;  // MXCSR: to nearest, no traps; FTZ
  static Control control() { return _mm_getcsr(); }
  static void set_control(Control bits) { _mm_setcsr(bits); }
#elif defined(__aarch64__)
  using Control = uint64_t;
  static constexpr Control kInForce = 0;  // FPCR: to nearest, no traps, nothing flushed
  static Control control() {
    Control bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void set_control(Control bits) { asm volatile("msr fpcr, %0" ::"r"(bits) : "memory"); }
#else  // as the CPU does it
  using Control = unsigned;
  static constexpr Control kInForce = 0;
  static Control control() { return 0; }
  static void set_control(Control) {}
#endif

  const Control before_;
};

}  // namespace tformer
