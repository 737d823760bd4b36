// What the calling thread's floating-point arithmetic makes of numbers below the smallest normal one.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tformer {

// While it lives, results below the smallest normal number are 0: weights of a sharp softmax pass through that range by
// the thousand, and multiplications with them take some CPUs many times as long. Operands stay what they
// are. All threads compute alike, whatever the caller has set for its own (torch.set_flush_denormal).
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(control()) { set_control(kDefault | kFlush); }
  ~FlushSubnormals() { set_control(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kDefault = 0x1f80, kFlush = 0x8000;  // of MXCSR: to nearest, no traps

#if defined(__x86_64__)
  static unsigned control() { return _mm_getcsr(); }
  static void set_control(unsigned bits) { _mm_setcsr(bits); }
#else  // as the CPU does it
  static unsigned control() { return 0; }
  static void set_control(unsigned) {}
#endif

  const unsigned before_;
};

}  // namespace tformer
