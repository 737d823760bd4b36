#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

// The build defines TFORMER_FOR_EACH_ISA(X) as X(name) for every ISA compiled in, least capable first.
#ifndef TFORMER_FOR_EACH_ISA
#error "TFORMER_FOR_EACH_ISA is not defined: compile through setup.py"
#endif

namespace tformer {

#define TFORMER_DECLARE_TABLE(isa) \
  namespace isa {                  \
  extern const CpuKernels kernels; \
  }
TFORMER_FOR_EACH_ISA(TFORMER_DECLARE_TABLE)
#undef TFORMER_DECLARE_TABLE

namespace {

// Every name this version knows, whether or not it is compiled into this binary.
constexpr const char* kKnownIsas[] = {"baseline", "avx2", "avx512", "avx512bf16", "amxbf16", "neonbf16"};

struct BuiltIsa {
  const char* name;
  const CpuKernels* kernels;
};

constexpr BuiltIsa kBuiltIsas[] = {
#define TFORMER_TABLE_ENTRY(isa) {#isa, &isa::kernels},
    TFORMER_FOR_EACH_ISA(TFORMER_TABLE_ENTRY)
#undef TFORMER_TABLE_ENTRY
};

#if defined(__x86_64__)
// Whether CPU and system have tile registers with bf16 products. Linux saves 8 KB of tiles only for processes that ask:
// once, for all threads (Documentation/arch/x86/xstate.rst).
bool tiles_are_granted() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestFeature = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestFeature, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Exactly the features that setup.py's flags let the compiler use. The builtin also asks whether the system
// saves the registers; F16C uses those of AVX, so its CPUID bit is enough beside "avx2".
bool cpu_supports(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx2") {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  }
  if (isa == "avx512") {
    return cpu_supports("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == "avx512bf16") return cpu_supports("avx512") && __builtin_cpu_supports("avx512bf16");
  if (isa == "amxbf16") {
    static const bool granted = tiles_are_granted();
    return cpu_supports("avx512bf16") && granted;
  }
#endif
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16 (Documentation/arch/arm64/elf_hwcaps.rst)
  if (isa == "neonbf16") return (getauxval(AT_HWCAP2) & kBf16) != 0;
#endif
  return isa == "baseline";
}

const CpuKernels* most_capable() {
  const CpuKernels* best = nullptr;
  for (const BuiltIsa& built : kBuiltIsas) {
    if (cpu_supports(built.name)) best = built.kernels;
  }
  return best;
}

std::string reason_against(const std::string& name) {
  for (const BuiltIsa& built : kBuiltIsas) {
    if (name == built.name) return "is not supported by this CPU";
  }
  for (const char* known : kKnownIsas) {
    if (name == known) return "is not compiled into this build";
  }
  return "is not a known instruction set";
}

// Null until the first choice: constant initialisation needs no thought about the order of constructors.
std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = chosen.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = most_capable();
    chosen.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

std::vector<std::string> built_cpu_isas() {
  std::vector<std::string> names;
  for (const BuiltIsa& built : kBuiltIsas) names.emplace_back(built.name);
  return names;
}

std::vector<std::string> supported_cpu_isas() {
  std::vector<std::string> names;
  for (const BuiltIsa& built : kBuiltIsas) {
    if (cpu_supports(built.name)) names.emplace_back(built.name);
  }
  return names;
}

void set_cpu_isa(const std::string& name, const std::string& source) {
  for (const BuiltIsa& built : kBuiltIsas) {
    if (name == built.name && cpu_supports(name)) {
      chosen.store(built.kernels, std::memory_order_release);
      return;
    }
  }
  std::string message = source + ": '" + name + "' " + reason_against(name) + ", expected one of";
  const char* separator = " ";
  for (const std::string& supported : supported_cpu_isas()) {
    message += separator + supported;
    separator = ", ";
  }
  throw std::invalid_argument(message);
}

void set_cpu_isa_from_environment() {
  const char* name = std::getenv("TFORMER_CPU_ISA");
  if (name != nullptr && *name != '\0') {
    set_cpu_isa(name, "TFORMER_CPU_ISA");
  } else {
    chosen.store(most_capable(), std::memory_order_release);
  }
}

}  // namespace tformer
