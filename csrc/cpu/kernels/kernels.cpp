// The kernels of one ISA: compiled once for each, with its -m flags and its name as TFORMER_ISA. TFORMER_EXTENDS, if
// defined, names an ISA of the same vectors, whose kernels serve wherever this one has nothing to add.
#include <type_traits>
#include <utility>

#include "../isa.h"
#include "attention_backward.h"
#include "attention_forward.h"
#include "ceilings.h"
#include "cross_entropy.h"
#include "linear_few_rows.h"
#include "residual_norm.h"

#ifdef TFORMER_EXTENDS
namespace tformer::TFORMER_EXTENDS {
extern const CpuKernels kernels;
}
#endif

namespace tformer::TFORMER_ISA {
namespace {

#ifdef TFORMER_EXTENDS
constexpr const CpuKernels* kExtended = &TFORMER_EXTENDS::kernels;
constexpr bool kExtends = true;
#else
constexpr const CpuKernels* kExtended = nullptr;
constexpr bool kExtends = false;
#endif

// Whether this ISA has attention of its own in products of the kind P, residual norms of its own for T: an extending
// ISA adds products of bf16, and with the first such, narrowing to it. What holds for norms holds for all that follows.
template <class P>
constexpr bool kHasAttention = !kExtends || !std::is_same_v<P, Wide<typename P::Real>>;
template <class T>
constexpr bool kHasNorms = !kExtends || (std::is_same_v<T, bf16> && !TFORMER_HAS_TILES);

// f(element of type T) for the type that dtype names.
template <class F>
auto for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// f(element, pack) for what products of p are made with; or what kFunction of the ISA extended does.
template <auto kFunction, class F, class... Rest>
auto for_products(F&& f, const AttentionParams& p, const Rest&... rest) {
  return for_dtype(p.dtype, [&](auto x) {
    using T = decltype(x);
    const auto with = [&](auto pack) {
      if constexpr (kHasAttention<decltype(pack)>) {
        return f(x, pack);
      } else {
        return (kExtended->*kFunction)(p, rest...);
      }
    };
    if constexpr (!std::is_same_v<SplitPack<T>, Pack<T>>) {
      if (p.split) return with(SplitPack<T>{});
    }
    return with(Pack<T>{});
  });
}

// Likewise f(element of x, element of the sum).
template <auto kFunction, class F, class... Rest>
auto for_norm_types(F&& f, const NormParams& p, const Rest&... rest) {
  return for_dtype(p.dtype, [&](auto x) {
    if constexpr (kHasNorms<decltype(x)>) {
      if (sizeof(x) == 2 && p.sum_dtype == DType::f32) return f(x, float{});
      return f(x, x);
    } else {
      return (kExtended->*kFunction)(p, rest...);
    }
  });
}

void attention_forward(const AttentionParams& p, const AttentionTask& t, const NextTask& then, void* scratch) {
  for_products<&CpuKernels::attention_forward>(
      [&](auto x, auto pack) { AttentionForward<decltype(x), decltype(pack)>(p, t, Scratch(scratch)).run(t, then); }, p,
      t, then, scratch);
}

void attention_merge(const AttentionParams& p, const AttentionTask& t, void* scratch) {
  for_products<&CpuKernels::attention_merge>(
      [&](auto x, auto pack) { AttentionForward<decltype(x), decltype(pack)>(p, t, Scratch(scratch)).merge(t); }, p, t,
      scratch);
}

size_t attention_forward_scratch(const AttentionParams& p, const AttentionTask& t) {
  return for_products<&CpuKernels::attention_forward_scratch>(
      [&](auto x, auto pack) { return AttentionForward<decltype(x), decltype(pack)>(p, t, Scratch(nullptr)).bytes; }, p,
      t);
}

double attention_sink_gradient_of(const AttentionParams& p, int64_t b, int64_t h) {
  return for_dtype(p.dtype, [&](auto x) { return attention_sink_gradient<decltype(x)>(p, b, h); });
}

void attention_backward(const AttentionParams& p, const AttentionTask& t, const NextTask& then, void* scratch) {
  for_products<&CpuKernels::attention_backward>(
      [&](auto x, auto pack) { AttentionBackward<decltype(x), decltype(pack)>(p, t, Scratch(scratch)).run(t, then); },
      p, t, then, scratch);
}

size_t attention_backward_scratch(const AttentionParams& p, const AttentionTask& t) {
  return for_products<&CpuKernels::attention_backward_scratch>(
      [&](auto x, auto pack) { return AttentionBackward<decltype(x), decltype(pack)>(p, t, Scratch(nullptr)).bytes; },
      p, t);
}

void norm_forward(const NormParams& p, int64_t begin, int64_t end, void* scratch) {
  for_norm_types<&CpuKernels::norm_forward>(
      [&](auto x, auto r) { ResidualNorm<decltype(x), decltype(r)>(p, Scratch(scratch)).forward(begin, end); }, p,
      begin, end, scratch);
}

void norm_backward(const NormParams& p, int64_t chunk, void* scratch) {
  for_norm_types<&CpuKernels::norm_backward>(
      [&](auto x, auto r) { ResidualNorm<decltype(x), decltype(r)>(p, Scratch(scratch)).backward(chunk); }, p, chunk,
      scratch);
}

void norm_sum(DType dtype, const void* partial, int64_t chunks, int64_t N, DType out_dtype, void* out) {
  for_dtype(out_dtype, [&](auto element) {
    auto* sums = static_cast<decltype(element)*>(out);
    dtype == DType::f64 ? sum_partials(static_cast<const double*>(partial), chunks, N, sums)
                        : sum_partials(static_cast<const float*>(partial), chunks, N, sums);
  });
}

size_t norm_scratch(const NormParams& p) {
  return for_norm_types<&CpuKernels::norm_scratch>(
      [&](auto x, auto r) { return ResidualNorm<decltype(x), decltype(r)>(p, Scratch(nullptr)).bytes; }, p);
}

void linear_few_rows(const LinearParams& p, int64_t part, int64_t begin, int64_t end) {
  for_dtype(p.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (sizeof(T) == 8) {
      __builtin_trap();  // the host lets no double come here
    } else if constexpr (kHasNorms<T>) {
      LinearFewRows<T>(p).run(part, begin, end);
    } else {
      kExtended->linear_few_rows(p, part, begin, end);
    }
  });
}

// run(kernel) for the type of the logits, or what kFunction of the ISA extended does.
template <auto kFunction, class Run>
void for_cross_entropy(const CrossEntropyParams& p, int64_t begin, int64_t end, Run&& run) {
  for_dtype(p.dtype, [&](auto x) {
    if constexpr (kHasNorms<decltype(x)>) {
      run(CrossEntropy<decltype(x)>{p});
    } else {
      (kExtended->*kFunction)(p, begin, end);
    }
  });
}

void cross_entropy_forward(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  for_cross_entropy<&CpuKernels::cross_entropy_forward>(p, begin, end, [&](auto op) { op.forward(begin, end); });
}

void cross_entropy_backward(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  for_cross_entropy<&CpuKernels::cross_entropy_backward>(p, begin, end, [&](auto op) { op.backward(begin, end); });
}

double fma_operations_of(DType dtype, int64_t rounds) {
  return for_dtype(dtype, [&](auto x) { return fma_operations<decltype(x)>(rounds); });
}

double exp_operations_of(DType dtype, int64_t rounds) {
  return for_dtype(dtype, [&](auto x) { return exp_operations<decltype(x)>(rounds); });
}

#define TFORMER_STRING(x) #x
#define TFORMER_NAME(x) TFORMER_STRING(x)

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels = {TFORMER_NAME(TFORMER_ISA),
                            kVectorBytes,
                            TFORMER_HAS_TILES != 0,
                            attention_forward,
                            attention_merge,
                            attention_forward_scratch,
                            attention_sink_gradient_of,
                            attention_backward,
                            attention_backward_scratch,
                            norm_forward,
                            norm_backward,
                            norm_sum,
                            norm_scratch,
                            linear_few_rows,
                            cross_entropy_forward,
                            cross_entropy_backward,
                            fma_operations_of,
                            exp_operations_of};

}  // namespace tformer::TFORMER_ISA
