#include "split.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa.h"

namespace tformer {
namespace {

constexpr const char* kNames[] = {"auto", "always", "never"};
enum Split : int { kAuto, kAlways, kNever };
std::atomic<int> chosen{kAuto};

// How many pairs of queries and keys share the slices of a row, times the width.
int64_t sharing(const AttentionParams& p) {
  const int64_t left = p.window_left < 0 ? p.Sk : p.window_left;
  const int64_t right = p.causal ? 0 : (p.window_right < 0 ? p.Sk : p.window_right);
  const int64_t keys = std::min(left + right + 1, p.causal ? p.Sk / 2 : p.Sk);
  return std::min(p.Sq, keys) * std::min(p.D, p.Dv);
}

}  // namespace

bool splits_products(const AttentionParams& p, bool backward) {
  if (!cpu_kernels().splits || (p.dtype != DType::f32 && p.dtype != DType::f16)) return false;
  const int split = chosen.load(std::memory_order_relaxed);
  if (split != kAuto) return split == kAlways;
  // From where on it is faster, see benchmarks/NOTES.md: float16 has two slices; float32, with three, gains less than a
  // neighbour on the core's other hardware thread can cost, unless products are large.
  return sharing(p) >= (p.dtype == DType::f16 ? 8192 : (backward ? 65536 : 32768));
}

void set_cpu_split(const std::string& name, const std::string& source) {
  for (int split = kAuto; split <= kNever; ++split) {
    if (name == kNames[split]) {
      chosen.store(split, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument(source + ": '" + name + "', expected one of auto, always, never");
}

std::string cpu_split() { return kNames[chosen.load(std::memory_order_relaxed)]; }

void set_cpu_split_from_environment() {
  const char* name = std::getenv("TFORMER_CPU_SPLIT");
  set_cpu_split(name != nullptr && *name != '\0' ? name : "auto", "TFORMER_CPU_SPLIT");
}

}  // namespace tformer
