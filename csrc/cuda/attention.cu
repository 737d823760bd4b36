// The small kernels around the products (merging splits, delta, gradients of sinks, sums), and the choice by dtype.
#include "attention_dispatch.h"
#include "attention_scores.h"

namespace tformer {
namespace gpu {
namespace {

// Batches in memory: packed sequences lie in one.
TFORMER_DEVICE int64_t stored_batches(const AttentionCall& call) { return call.packed ? 1 : call.p.B; }

// o and lse of a row out of those of its splits; a block for each row. Each warp adds every kWarps-th split, so that
// many are read at a time; the warps' sums are then added in order.
template <class T>
struct Merge {
  using R = Real<T>;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kParts = kMostHeadDim / kWarp;
  static constexpr size_t kSharedBytes = kWarps * kMostHeadDim * sizeof(R);

  static TFORMER_DEVICE void run(const AttentionCall& call, char* shared) {
    const AttentionParams& p = call.p;
    const int64_t row = block_index<0>(), stride = call.split_stride[0];
    const int64_t b = row / (p.Hq * p.Sq), h = row / p.Sq % p.Hq, i = row % p.Sq;
    const R* lse = static_cast<const R*>(call.split_lse) + row;
    const auto splits = static_cast<int>(call.splits);
    R m = -kInfinity<R>, l = 0;  // as every warp finds them
    bool alive = false;
    for (int n = lane(); n < splits; n += kWarp) {
      const R x = lse[n * stride];
      alive = alive || x != -kInfinity<R>;
      m = maximum(m, x);
    }
    alive = any(alive);
    for (int step = kWarp / 2; step; step /= 2) m = maximum(m, shuffle_xor(m, step));
    if (p.sinks) m = maximum(m, sink_of<R>(p, h));
    if (m == -kInfinity<R>) m = 0;
    for (int n = lane(); n < splits; n += kWarp) l += exp(lse[n * stride] - m);
    for (int step = kWarp / 2; step; step /= 2) l += shuffle_xor(l, step);
    if (p.sinks) l += exp(sink_of<R>(p, h) - m);

    const auto width = static_cast<int>(p.Dv);
    const R* part = static_cast<const R*>(call.split_o) + (warp() * stride + row) * width + lane();
    R sum[kParts] = {};
#pragma unroll 4
    for (int n = warp(); n < splits; n += kWarps, part += kWarps * stride * width) {
      const R x = lse[n * stride], weight = exp(x - m);
#pragma unroll
      for (int c = 0; c < kParts; ++c) {
        const R o = lane() + c * kWarp < width ? part[c * kWarp] : R(0);
        sum[c] = x == -kInfinity<R> ? sum[c] : fma(weight, o, sum[c]);
      }
    }
    R* sums = reinterpret_cast<R*>(shared);
#pragma unroll
    for (int c = 0; c < kParts; ++c) sums[warp() * kMostHeadDim + c * kWarp + lane()] = sum[c];
    sync_block();
    T* o = row_at<T>(p.o, b, h, i);
    for (int64_t d = thread_index(); d < p.Dv; d += kThreads) {
      R total = 0;
      for (int n = 0; n < kWarps; ++n) total += sums[n * kMostHeadDim + d];
      o[d] = narrow<T>(alive ? total / l : R(0));
    }
    if (thread_index() == 0) {
      static_cast<R*>(p.lse)[b * p.lse_stride[0] + h * p.lse_stride[1] + i] = alive ? m + log(l) : -kInfinity<R>;
    }
  }
};

// delta = rowsum(do * o) - dlse; eight lanes for each row.
template <class T>
struct Delta {
  using R = Real<T>;
  static constexpr int kThreads = 128, kLanes = 8, kRows = kThreads / kLanes;

  static TFORMER_DEVICE void run(const AttentionCall& call, char*) {
    const AttentionParams& p = call.p;
    const int64_t row = block_index<0>() * kRows + thread_index() / kLanes, rows = stored_batches(call) * p.Hq * p.Sq;
    const int64_t b = row / (p.Hq * p.Sq), h = row / p.Sq % p.Hq, i = row % p.Sq;
    const bool there = row < rows;
    R sum = 0;
    if (there) {
      const T *o = row_at<const T>(p.o, b, h, i), *go = row_at<const T>(p.grad_o, b, h, i);
      sum = call.aligned && p.Dv % Chunk<T>::kSize == 0 ? dot_of_chunks(o, go, p.Dv) : dot(o, go, p.Dv);
    }
    for (int step = kLanes / 2; step; step /= 2) sum += shuffle_xor(sum, step);
    if (!there || lane() % kLanes != 0) return;
    const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + i;
    const bool dead = static_cast<const R*>(p.lse)[at] == -kInfinity<R>;
    const R dlse = p.grad_lse && !dead ? static_cast<const R*>(p.grad_lse)[at] : R(0);
    const_cast<double*>(p.delta)[at] = static_cast<double>(sum) - static_cast<double>(dlse);
  }

  static TFORMER_DEVICE R dot(const T* a, const T* b, int64_t n) {
    R sum = 0;
    for (int64_t d = lane() % kLanes; d < n; d += kLanes) sum = fma(widen(a[d]), widen(b[d]), sum);
    return sum;
  }
  static TFORMER_DEVICE R dot_of_chunks(const T* a, const T* b, int64_t n) {
    R sum = 0;
    for (int64_t c = lane() % kLanes; c < n / Chunk<T>::kSize; c += kLanes) {
      const Chunk<T> x = reinterpret_cast<const Chunk<T>*>(a)[c], y = reinterpret_cast<const Chunk<T>*>(b)[c];
#pragma unroll
      for (int e = 0; e < Chunk<T>::kSize; ++e) sum = fma(widen(x.x[e]), widen(y.x[e]), sum);
    }
    return sum;
  }
};

// dsink of a head = - sum over its rows of the sink's weight times delta; a block for each head.
template <class T>
struct Sinks {
  using R = Real<T>;
  static constexpr int kThreads = 256;

  static TFORMER_DEVICE void run(const AttentionCall& call, char* shared) {
    const AttentionParams& p = call.p;
    const int64_t h = block_index<0>();
    const double logit = sink_of<double>(p, h);
    double sum = 0;
    for (int64_t n = thread_index(); n < stored_batches(call) * p.Sq; n += kThreads) {
      const int64_t at = n / p.Sq * p.lse_stride[0] + h * p.lse_stride[1] + n % p.Sq;
      const R lse = static_cast<const R*>(p.lse)[at];
      if (lse != -kInfinity<R>) sum -= exp(logit - static_cast<double>(lse)) * p.delta[at];
    }
    auto* sums = reinterpret_cast<double*>(shared);
    sums[thread_index()] = sum;
    for (int step = kThreads / 2; step; step /= 2) {
      sync_block();
      if (thread_index() < step) sums[thread_index()] += sums[thread_index() + step];
    }
    if (thread_index() == 0) call.grad_sinks[h] = sums[0];
  }
};

// A thread for each result, or a warp where much is summed.
template <class R, int kLanes>
struct Sum {
  static constexpr int kThreads = 128, kResults = kThreads / kLanes;

  static TFORMER_DEVICE void run(const SumCall& call, char*) {
    int64_t at = block_index<0>() * kResults + thread_index() / kLanes;
    const int64_t result = at;
    if (result >= call.size[0] * call.size[1] * call.size[2] * call.size[3]) return;
    const R* in = static_cast<const R*>(call.in);
    for (int d = 3; d >= 0; --d) {
      in += at % call.size[d] * call.stride[d];
      at /= call.size[d];
    }
    int64_t count = 1;
    for (int64_t size : call.reduced_size) count *= size;
    R sum = 0;
    for (int64_t n = thread_index() % kLanes; n < count; n += kLanes) {
      int64_t rest = n, offset = 0;
      for (int d = 4; d >= 0; --d) {
        offset += rest % call.reduced_size[d] * call.reduced_stride[d];
        rest /= call.reduced_size[d];
      }
      sum += in[offset];
    }
    if (kLanes > 1) {
      for (int step = kLanes / 2; step; step /= 2) sum += shuffle_xor(sum, step);
    }
    if (thread_index() % kLanes == 0) static_cast<R*>(call.out)[result] = sum;
  }
};

template <class R, int kLanes>
Status launch_sum_kernel(const SumCall& call, Stream stream) {
  using Kernel = Sum<R, kLanes>;
  const int64_t results = call.size[0] * call.size[1] * call.size[2] * call.size[3];
  return launch<Kernel>({(results + Kernel::kResults - 1) / Kernel::kResults}, 0, stream, call);
}

template <class T>
struct Element {
  using type = T;
};
template <class F>
Status for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(Element<double>{});
    case DType::bf16:
      return f(Element<bf16>{});
    case DType::f16:
      return f(Element<f16>{});
    default:
      return f(Element<float>{});
  }
}

}  // namespace
}  // namespace gpu

gpu::Status launch_attention_forward(const AttentionCall& call, gpu::Stream stream) {
  return gpu::for_dtype(call.p.dtype,
                        [&](auto t) { return gpu::launch_forward<typename decltype(t)::type>(call, stream); });
}

gpu::Status launch_attention_one_pass(const OnePassCall& call, size_t shared_bytes, gpu::Stream stream) {
  return call.call.p.dtype == DType::bf16 ? gpu::launch_one_pass<gpu::bf16>(call, shared_bytes, stream)
                                          : gpu::launch_one_pass<gpu::f16>(call, shared_bytes, stream);
}

gpu::Status launch_attention_dkv(const AttentionCall& call, gpu::Stream stream) {
  return gpu::for_dtype(call.p.dtype,
                        [&](auto t) { return gpu::launch_dkv<typename decltype(t)::type>(call, stream); });
}

gpu::Status launch_attention_dq(const AttentionCall& call, gpu::Stream stream) {
  return gpu::for_dtype(call.p.dtype, [&](auto t) { return gpu::launch_dq<typename decltype(t)::type>(call, stream); });
}

gpu::Status launch_attention_merge(const AttentionCall& call, gpu::Stream stream) {
  const int64_t rows = call.p.B * call.p.Hq * call.p.Sq;
  return gpu::for_dtype(call.p.dtype, [&](auto t) {
    using Kernel = gpu::Merge<typename decltype(t)::type>;
    return gpu::launch<Kernel>({rows}, Kernel::kSharedBytes, stream, call);
  });
}

gpu::Status launch_attention_delta(const AttentionCall& call, gpu::Stream stream) {
  const int64_t rows = (call.packed ? 1 : call.p.B) * call.p.Hq * call.p.Sq;
  return gpu::for_dtype(call.p.dtype, [&](auto t) {
    using Kernel = gpu::Delta<typename decltype(t)::type>;
    return gpu::launch<Kernel>({(rows + Kernel::kRows - 1) / Kernel::kRows}, 0, stream, call);
  });
}

gpu::Status launch_attention_sinks(const AttentionCall& call, gpu::Stream stream) {
  return gpu::for_dtype(call.p.dtype, [&](auto t) {
    using Kernel = gpu::Sinks<typename decltype(t)::type>;
    return gpu::launch<Kernel>({call.p.Hq}, Kernel::kThreads * sizeof(double), stream, call);
  });
}

gpu::Status launch_sum(const SumCall& call, gpu::Stream stream) {
  int64_t count = 1;
  for (int64_t size : call.reduced_size) count *= size;
  if (count > gpu::kWarp) {
    return call.is_double ? gpu::launch_sum_kernel<double, gpu::kWarp>(call, stream)
                          : gpu::launch_sum_kernel<float, gpu::kWarp>(call, stream);
  }
  return call.is_double ? gpu::launch_sum_kernel<double, 1>(call, stream)
                        : gpu::launch_sum_kernel<float, 1>(call, stream);
}

}  // namespace tformer
