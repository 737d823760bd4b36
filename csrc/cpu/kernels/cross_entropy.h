// loss = (1 - s) (lse - x[target]) + s (lse - mean(x)) for rows x of logits, and its gradient; s: label smoothing.
// A row is read once in each direction; of what softmax makes of it only the highest logit and the sum of
// exp(x - highest) are kept: lse is the former plus the logarithm of the latter, but large, and would be rounded.
#pragma once

#include "../../params.h"
#include "vec_math.h"

namespace tformer::TFORMER_ISA {
namespace {

// T: type of the logits and of their gradient.
template <class T>
struct CrossEntropy {
  using Real = std::conditional_t<sizeof(T) == 8, double, float>;
  static constexpr int L = kLanes<Real>;
  static constexpr int kStep = 2 * L;
  static constexpr int64_t kBlock = 1024;  // elements that stay in L1 between their maximum and their sum
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr Real kNone = -static_cast<Real>(__builtin_inf());

  const CrossEntropyParams& p;

  void forward(int64_t begin, int64_t end) const {
    Real *loss = static_cast<Real*>(p.loss), *highest = static_cast<Real*>(p.highest);
    Real* sum = static_cast<Real*>(p.sum);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t target = p.target[i];
      loss[i] = highest[i] = sum[i] = 0;
      if (target == p.ignore_index) continue;
      const T* x = static_cast<const T*>(p.x) + i * p.x_stride;
      const Sums sums = sums_of(x);
      const double log_sum = sums.of_exp == 0 ? kNone : log_vec<double>(splat(sums.of_exp))[0];
      const double of_target = (static_cast<double>(sums.highest) - element(x + target)) + log_sum;
      const double of_mean = (static_cast<double>(sums.highest) - sums.of_x / static_cast<double>(p.N)) + log_sum;
      const double s = p.label_smoothing;
      loss[i] = static_cast<Real>(s > 0 ? (1 - s) * of_target + s * of_mean : of_target);
      highest[i] = sums.highest, sum[i] = static_cast<Real>(sums.of_exp);
    }
  }

  void backward(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      T* dx = static_cast<T*>(p.grad_x) + i * p.grad_x_stride;
      const int64_t target = p.target[i];
      if (target == p.ignore_index) {
        std::memset(dx, 0, static_cast<size_t>(p.N) * sizeof(T));
        continue;
      }
      const Real s = static_cast<Real>(p.label_smoothing), grad = static_cast<const Real*>(p.grad_loss)[i];
      const Row row{static_cast<const T*>(p.x) + i * p.x_stride,
                    dx,
                    target,
                    static_cast<const Real*>(p.highest)[i],
                    grad / static_cast<const Real*>(p.sum)[i],
                    grad * (1 - s),
                    grad * s / static_cast<Real>(p.N)};
      // stores past the caches are whole lines
      const int64_t before = p.around_cache ? elements_before_line(dx, p.N) : 0;
      int64_t c = 0;
      for (; c < before; c += kStep) write_part(row, c, before - c < kStep ? before - c : kStep);
      for (c = before; c + kStep <= p.N; c += kStep) write_step(row, c);
      if (c < p.N) write_part(row, c, p.N - c);
    }
    if (p.around_cache) stream_fence();
  }

 private:
  static TFORMER_INLINE Real element(const T* x) { return load_as<Real>(x, 1)[0]; }
  // The first n lanes, -inf behind them.
  static TFORMER_INLINE Vec<Real> part(const T* x, int64_t n) {
    return (lane_index<Real>() < static_cast<Real>(n)) ? load_as<Real>(x, n) : splat(kNone);
  }

  struct Sums {
    Real highest;
    double of_exp, of_x;  // of exp(x - highest), of x (with label smoothing only)
  };
  // Block by block; the maximum is followed, so that no power overflows (Milakov, Gimelshein 2018).
  Sums sums_of(const T* x) const {
    Sums to{kNone, 0, 0};
    for (int64_t c = 0; c < p.N; c += kBlock) {
      const int64_t n = p.N - c < kBlock ? p.N - c : kBlock;
      const Real highest = highest_of(x + c, n);
      if (highest > to.highest) {
        to.of_exp *= exp_vec<Real>(splat(to.highest - highest))[0];
        to.highest = highest;
      }
      // of nothing but -inf so far: exp(-inf - 0)
      to.of_exp += static_cast<double>(sum_of_exp(x + c, n, to.highest == kNone ? 0 : to.highest));
      if (p.label_smoothing > 0) to.of_x += sum_of(x + c, n);
    }
    return to;
  }
  static constexpr int kSums = 4;  // that are independent of each other
  // Asks for what comes two blocks further on: while a block is summed nothing else is read.
  static TFORMER_INLINE void prefetch_ahead(const T* x) {
    constexpr int kLine = 64, kBytes = kSums * L * static_cast<int>(sizeof(T));
    for (int at = 0; at < kBytes; at += kLine) __builtin_prefetch(reinterpret_cast<const char*>(x + 2 * kBlock) + at);
  }
  static TFORMER_INLINE Real highest_of(const T* x, int64_t n) {
    Vec<Real> highest[kSums];
    for (int u = 0; u < kSums; ++u) highest[u] = splat(kNone);
    int64_t c = 0;
    for (; c + kSums * L <= n; c += kSums * L) {
      prefetch_ahead(x + c);
      for (int u = 0; u < kSums; ++u) highest[u] = maximum(load_as<Real>(x + c + u * L), highest[u]);
    }
    for (; c < n; c += L) highest[0] = maximum(n - c < L ? part(x + c, n - c) : load_as<Real>(x + c), highest[0]);
    return max_lanes<Real>(maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3])));
  }
  static TFORMER_INLINE Real sum_of_exp(const T* x, int64_t n, Real highest) {
    Vec<Real> sum[kSums] = {};
    int64_t c = 0;
    for (; c + kSums * L <= n; c += kSums * L) {
      for (int u = 0; u < kSums; ++u) sum[u] += exp_vec<Real>(load_as<Real>(x + c + u * L) - highest);
    }
    for (; c < n; c += L) {
      sum[0] += exp_vec<Real>((n - c < L ? part(x + c, n - c) : load_as<Real>(x + c)) - highest);
    }
    return sum_lanes<Real>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  static TFORMER_INLINE double sum_of(const T* x, int64_t n) {
    Vec<Real> sum = {};
    int64_t c = 0;
    for (; c + L <= n; c += L) sum += load_as<Real>(x + c);
    if (c < n) sum += load_as<Real>(x + c, n - c);
    return static_cast<double>(sum_lanes<Real>(sum));
  }

  // dx = exp(x - highest) of_exp - of_each - (of_target at the target)
  struct Row {
    const T* x;
    T* dx;
    int64_t target;
    Real highest, of_exp, of_target, of_each;
  };
  static TFORMER_INLINE int64_t elements_before_line(const T* to, int64_t most) {
    constexpr uintptr_t kLine = 64;
    const auto n = static_cast<int64_t>((kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine / sizeof(T));
    return n < most ? n : most;
  }
  static TFORMER_INLINE void gradient(const Row& row, int64_t c, Vec<Real> (&v)[2]) {
    for (int u = 0; u < 2; ++u)
      v[u] = exp2_vec<Real, kNarrow>((v[u] - row.highest) * kLog2e<Real>) * row.of_exp - row.of_each;
    if (const int64_t at = row.target - c; at >= 0 && at < kStep) {
      for (int u = 0; u < 2; ++u) {
        const Vec<Real> index = lane_index<Real>() + static_cast<Real>(u * L);
        v[u] -= (index == static_cast<Real>(at)) ? splat(row.of_target) : Vec<Real>{};
      }
    }
  }
  TFORMER_INLINE void write_step(const Row& row, int64_t c) const {
    Vec<Real> v[2] = {load_as<Real>(row.x + c), load_as<Real>(row.x + c + L)};
    gradient(row, c, v);
    p.around_cache ? stream_two_as<Real>(row.dx + c, v[0], v[1]) : store_two_as<Real>(row.dx + c, v[0], v[1]);
  }
  static TFORMER_INLINE void write_part(const Row& row, int64_t c, int64_t n) {
    const int64_t count[2] = {n < L ? n : L, n < L ? 0 : n - L};
    Vec<Real> v[2] = {load_as<Real>(row.x + c, count[0]), load_as<Real>(row.x + c + L, count[1])};
    gradient(row, c, v);
    for (int u = 0; u < 2; ++u) store_as<Real>(row.dx + c + u * L, v[u], count[u]);
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
